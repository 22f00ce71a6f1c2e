"""Models that keep their own forward meet all other options: each pair trains right, or is refused before the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from launch import train
from pipeline import ChannelPlan, DNIPlan, OptimizerPlan, Plan, PlanError, Recipe
from pipeline.data.network import arguments
from pipeline.data.recipe import build_model
from pipeline.run.flops import count_flops
from pipeline.run.reference import run_reference
from pipeline.run.resolve import resolve
from tests.oracle import assert_same
from tests.test_segment import LongSkips, TiedByHand, Tokens, TwoBranches

STEPS, ROWS = 10, 8


def _ids(index: int) -> Tensor:
    return torch.randint(0, 11, (ROWS, 6), generator=torch.Generator().manual_seed(index))


def _dicts(index: int) -> dict[str, Tensor]:
    ids = _ids(index)
    return {"ids": ids, "mask": (ids > index % 3).long(), "labels": ids.roll(1, 1)}


def _of_dict(output: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output["logits"].flatten(0, 1), given["labels"].flatten())


class Masked(nn.Module):
    """A mask of floating-point numbers is needed above the cut, and gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = F.relu(self.mix(self.embed(ids)) * mask[..., None])
        out: Tensor = self.out(h * (1 - mask[..., None] / 2))
        return out


def _masked(index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    ids = _ids(index)
    return (ids, (ids > 2).float()), ids


def _tokens() -> nn.Module:
    class Labelled(Tokens):
        def forward(self, *, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return super().forward(ids=ids, mask=mask)

    return Labelled()


def _by_letter(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), labels.flatten())


TOKENS = Recipe(name="tokens", model=_tokens, batches=_dicts, loss=_of_dict)
TIED = Recipe(name="tied", model=TiedByHand, batches=lambda i: (_ids(i), _ids(i).roll(1, 1)), loss=_by_letter)
MASKED = Recipe(name="masked", model=Masked, batches=_masked, loss=_by_letter)
RECIPES = {"tokens": TOKENS, "tied": TIED, "masked": MASKED}


def alone(recipe: Recipe, plan: Plan) -> dict[str, Tensor]:
    """A plain loop over the model as it is; parts of a batch add up."""
    model = build_model(recipe, plan.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.optimizer.lr, fused=True)
    for step in range(plan.steps or 0):
        batch = recipe.seeded_batch(plan.seed, step)
        args, kwargs = arguments(batch.inputs)
        optimizer.zero_grad()
        parts = plan.microbatches
        for part in range(parts):
            rows = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
            mine = [each[rows] for each in args]
            named = {name: each[rows] for name, each in kwargs.items()}
            labels = batch.labels
            labels = {k: v[rows] for k, v in labels.items()} if isinstance(labels, dict) else labels[rows]
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast is not None):
                loss = recipe.loss(model(*mine, **named), labels)
            (loss / parts).backward()
        optimizer.step()
    return dict(model.state_dict())


def right(name: str, state: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """To the last bit; where a weight is used twice on one side of a cut sums depend on their order."""
    assert state.keys() == truth.keys()
    for path, tensor in truth.items():
        torch.testing.assert_close(state[path], tensor, rtol=1e-5, atol=1e-6, msg=f"{name}: {path}")


@pytest.mark.parametrize("options", [{}, {"microbatches": 4}, {"autocast": "bf16"}], ids=str)
@pytest.mark.parametrize("mode", ["naive", "gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_locked_training_equals_the_plain_loop(name: str, stages: int, mode: str, options: dict[str, Any]) -> None:
    if mode == "naive" and "microbatches" in options:
        pytest.skip("naive cuts no batches")
    if name == "tied" and stages == 3:
        pytest.skip("the model has two layers")
    plan = Plan(mode=mode, stages=stages, steps=STEPS, balance="layers", **options)
    done = run_reference(RECIPES[name], plan)
    assert done.resolved.plan.split == "forward"
    truth = alone(RECIPES[name], plan)
    if name == "tokens" and mode == "naive" and not options:
        assert_same(done.state_tensors(), truth)
    right(name, done.state_tensors(), truth)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "async-1f1b"},
        {"mode": "local"},
        *({"targets": targets} for targets in ("bootstrap", "true", "mixed")),
        *({"targets": targets, "quality_every": 3} for targets in ("bootstrap", "true")),
        {"dni": DNIPlan(rows=0.5)},
        {"warmup_steps": 4},
        {"update_probability": 0.5},
        {"unlock": "auto"},
        {"wire_dtype": "bf16"},
        {"hop_steps": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["tokens", "tied"])
def test_what_is_not_locked_trains(name: str, options: dict[str, Any]) -> None:
    options = dict(options)
    channel = ChannelPlan(wire_dtype=options.pop("wire_dtype", None))
    plan = Plan(stages=2, steps=STEPS, balance="layers", channel=channel, **options)
    before = build_model(RECIPES[name], 0).state_dict()
    state = run_reference(RECIPES[name], plan).state_tensors()
    assert all(torch.isfinite(each).all() for each in state.values())
    assert any(not torch.equal(state[path], before[path]) for path in before)


@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_replicas_of_such_a_model_train(mode: str) -> None:
    done = run_reference(TOKENS, Plan(mode=mode, stages=2, replicas=2, steps=STEPS, balance="layers"))
    assert all(torch.isfinite(each).all() for each in done.state_tensors().values())


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        (TOKENS, {"compile": True}, "compile needs a chain of layers"),
        (TIED, {"replicas": 2, "mode": "naive"}, "are the same tensor, in several stages: choose replicas 1"),
        (TIED, {"deterministic": True}, "deterministic is not there where stages share weights"),
        (TOKENS, {"dni": DNIPlan(form="label_residual")}, "it reads one tensor of labels, and the loss takes several"),
        (MASKED, {}, "layer embed gives 2 tensors of floating-point numbers, .* make a mask one of whole numbers"),
        (TOKENS, {"split": "chain"}, "split is chain, whose layers take inputs by place"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_go_together_is_refused(recipe: Recipe, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        resolve(recipe, Plan(**{"stages": 2, "steps": STEPS, "balance": "layers", **options}))


def test_long_skips_are_refused_where_a_stage_predicts() -> None:
    images = torch.randn(8, 3, 8, 8)
    labels = torch.zeros(8, 8, 8, dtype=torch.long)
    recipe = Recipe(name="skips", model=LongSkips, batches=[(images, labels)], loss=F.cross_entropy)
    with pytest.raises(PlanError, match="gives 2 tensors of floating-point numbers"):
        resolve(recipe, Plan(stages=2, steps=4, balance="layers"))
    resolved = resolve(recipe, Plan(mode="naive", stages=2, steps=4, balance="layers"))
    assert all(stage.forward > 0 for stage in count_flops(recipe, resolved.plan, resolved.cuts))


def test_inputs_of_several_tensors_and_an_auxiliary_output() -> None:
    def loss(output: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        return F.cross_entropy(output[0], labels) + 0.1 * output[1].square().mean()

    data = [((torch.randn(8, 6), torch.randn(8, 3)), torch.randint(0, 2, (8,))) for _ in range(3)]
    recipe = Recipe(name="two", model=TwoBranches, batches=data, loss=loss)
    plan = Plan(mode="naive", stages=2, steps=STEPS, balance="layers")
    right("two", run_reference(recipe, plan).state_tensors(), alone(recipe, plan))
    with pytest.raises(PlanError, match="the loss depends on 2 tensors of it"):
        resolve(recipe, replace(plan, mode="unlocked"))


class Borrows(nn.Module):
    """One layer reads another one's weight, which it does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), _Reader()
        self.two.others = [self.one]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.flatten(self.one(x), 1))


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(6, 3), list[nn.Linear]()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.own(F.linear(x, self.others[0].weight))
        return out


class Misnamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


def _refused(model: Callable[[], nn.Module], batch: Any) -> str:
    recipe = Recipe(name="wrong", model=model, batches=[batch], loss=lambda o, y: o.square().mean())
    with pytest.raises(PlanError) as caught:
        resolve(recipe, Plan(stages=2, steps=4, balance="layers"))
    return str(caught.value)


def test_mistakes_have_a_sentence() -> None:
    """A weight of another layer would stay as it began in the stage that borrows it."""
    pair = torch.randn(8, 6), torch.zeros(8, dtype=torch.long)
    assert "layer two computes with one.weight, which it does not hold" in _refused(Borrows, pair)
    assert "Misnamed.forward raises TypeError" in _refused(Misnamed, {"y": torch.randn(8, 6)})
    weights = {"x": torch.randn(8, 6), "weights": torch.ones(3)}
    assert "both need the same, non-zero number of rows" in _refused(Misnamed, weights)


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_a_loader_with_worker_processes_and_tied_weights_train_in_processes(mode: str, tmp_path: Path) -> None:
    pairs = [(row, row.roll(1)) for index in range(8) for row in _ids(index)]
    loader = DataLoader(pairs, batch_size=ROWS, num_workers=2, shuffle=True)
    optimizer = OptimizerPlan(lr=0.01)
    plan = Plan(mode=mode, stages=2, steps=24, balance="layers", optimizer=optimizer)
    done = train(model=TiedByHand, batches=loader, loss=_by_letter, plan=plan, runs=tmp_path, quiet=True)
    state = done.state_tensors()
    assert all(torch.isfinite(each).all() for each in state.values())
    if mode == "naive":
        recipe = Recipe(name="alone", model=TiedByHand, batches=loader, loss=_by_letter)
        right("loader", state, alone(recipe, plan))
