"""How a stage computes: under autocast a pipeline equals a single process bit for bit; compiled, to rounding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import problems
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from safetensors.torch import load_file
from torch import Tensor, nn

from launch.bench.single_process import run_single
from launch.setup.resolve_source import resolve_source
from launch.training import train
from pipeline import Plan, Recipe, run_reference
from pipeline.data.recipe import build_model
from pipeline.model.compute import ComputeContext
from pipeline.plan.device_choice import DeviceChoice
from pipeline.seeding import seed_layer

STEPS = 6


def _alone(recipe: Recipe, plan: Plan) -> dict[str, Tensor]:
    """A plain loop under autocast over the unsplit model."""
    model = build_model(recipe, plan.seed)
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.optimizer.lr, fused=True)
    for step in range(plan.steps or 0):
        x, labels = recipe.batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for index, layer in enumerate(model):
                seed_layer(plan.seed, index, step)
                x = layer(x)
            loss = recipe.loss(x, labels)
        loss.backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def autocast_alone() -> dict[str, Tensor]:
    return _alone(problems.recipe(), Plan(steps=STEPS))


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 7), (2, 3, 3)])
def test_locked_training_under_autocast_equals_a_single_process_bit_for_bit(
    sizes: tuple[int, ...], autocast_alone: dict[str, Tensor]
) -> None:
    plan = Plan(mode="naive", steps=STEPS, stages=len(sizes), sizes=sizes, autocast="bf16")
    split = run_reference(problems.recipe(), plan).state_tensors()
    assert_same(split, autocast_alone)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in split.values()), "weights stay float32"


def test_autocast_does_something(autocast_alone: dict[str, Tensor]) -> None:
    plain = run_reference(problems.recipe(), Plan(mode="naive", steps=STEPS, stages=2, sizes=(4, 4))).state_tensors()
    assert not torch.equal(plain["0.weight"], autocast_alone["0.weight"])
    assert torch.allclose(plain["0.weight"], autocast_alone["0.weight"], atol=0.05)


@pytest.mark.parametrize("mode", ["unlocked", "local", "async-1f1b"])
@pytest.mark.parametrize("targets", ["bootstrap", "true"])
def test_every_mode_learns_under_autocast(mode: str, targets: str) -> None:
    if targets != "bootstrap" and mode != "unlocked":
        pytest.skip("targets are for unlocked training")
    plan = Plan(mode=mode, targets=targets, steps=60, stages=3, sizes=(3, 3, 2), autocast="bf16")
    losses = run_reference(problems.recipe(), plan).losses
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.processes
def test_processes_under_autocast_send_what_the_layers_give(tmp_path: Path, autocast_alone: dict[str, Tensor]) -> None:
    """The activation behind a linear layer is bf16 then: half the bytes, and still exact."""
    recipe = problems.recipe()
    plan = Plan(mode="naive", steps=STEPS, stages=2, sizes=(5, 3), autocast="bf16", device="cpu")
    result = train(
        model=recipe.model, batches=recipe.batches, loss=recipe.loss, plan=plan, runs=tmp_path, name="a", quiet=True
    )
    assert_same(load_file(result.run_dir / "model.safetensors"), autocast_alone)
    rows, wide, label_bytes = problems.ROWS, 24, 8
    assert result.finished[0].down_bytes == STEPS * rows * (wide * 2 + label_bytes)


@pytest.mark.processes
def test_the_single_process_computes_as_the_plan_says() -> None:
    plan = resolve_source(problems.recipe, Plan(mode="naive", stages=1, steps=4, device="cpu")).plan
    plain = run_single(problems.recipe, plan, threads=1, warmup=1, within_s=60.0)
    bf16 = Plan(mode="naive", stages=1, steps=4, device="cpu", autocast="bf16")
    rounded = run_single(
        problems.recipe, resolve_source(problems.recipe, bf16).plan, threads=1, warmup=1, within_s=60.0
    )
    assert plain.loss != rounded.loss
    assert rounded.loss == pytest.approx(plain.loss, rel=0.05)


def test_a_module_is_moved_and_stays_the_same_object() -> None:
    computing, layer = ComputeContext(Plan(), "cpu"), nn.Linear(3, 3)
    weight, x = layer.weight, torch.ones(2, 3)
    assert computing.placed(layer) is layer
    assert layer.weight is weight
    assert computing.here(x)[0] is x
    assert computing.chain([layer]) is None


def smooth() -> nn.Sequential:
    """Without random numbers, of which a compiled stage draws others."""
    return nn.Sequential(nn.Linear(problems.WIDTH, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))


def smooth_recipe(held_out: bool = True) -> Recipe:
    """The same, learning."""
    evaluation = problems.held_out if held_out else None
    return Recipe(name="smooth", model=smooth, batches=problems.batch, loss=F.cross_entropy, evaluation=evaluation)


@pytest.mark.parametrize("mode", ["naive", "unlocked", "local"])
def test_compiled_stages_compute_the_same_up_to_rounding(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as by torch.compile; the code is not generated, which takes most of a minute."""
    calls: list[nn.Module] = []

    def compiling(module: nn.Module) -> object:
        calls.append(module)
        return torch._dynamo.optimize("aot_eager")(module)

    monkeypatch.setattr(torch, "compile", compiling)
    plan = Plan(mode=mode, stages=2, sizes=(2, 3), steps=8)
    plain = run_reference(smooth_recipe(), plan)
    compiled = run_reference(smooth_recipe(), replace(plan, compile=True))
    assert [len(list(module.children())) for module in calls] == [2, 3]
    for name, tensor in plain.state_tensors().items():
        torch.testing.assert_close(compiled.state_tensors()[name], tensor, rtol=1e-4, atol=1e-5)
    assert compiled.scores[-1][1].loss() == pytest.approx(plain.scores[-1][1].loss(), rel=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler for the CPU")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, when they are imported
def test_a_stage_is_compiled_to_code_of_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)  # an earlier test may have compiled the same
    monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    plan, recipe = Plan(mode="naive", stages=1, sizes=(5,), steps=2), smooth_recipe(held_out=False)
    plain, compiled = run_reference(recipe, plan), run_reference(recipe, replace(plan, compile=True))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert list(tmp_path.rglob("*.cpp")), "code was generated"


def test_a_choice_of_devices_says_them_once() -> None:
    assert DeviceChoice(("cuda:0", "cuda:0"), "").says == "cuda:0"
    assert DeviceChoice(("cpu", "cuda:0"), "").says == "cpu, cuda:0"
