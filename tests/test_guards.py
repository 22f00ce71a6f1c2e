"""A run that diverges says so, at the stage and batch where that began, before the weights suffer; healthy ones go on.

And clipping: the one remedy that is part of the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.setup.recipe_source import GivenRecipe
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import DNIPlan, OptimizerPlan, Plan, PlanError, Recipe, StageError, run_reference
from pipeline.data.recipe import build_model
from pipeline.dni.dni import DNI
from pipeline.messages.bundle import Item, present
from pipeline.model.optimizers import build_optimizer
from pipeline.model.partition import Layer, layers_of, split
from pipeline.plan.check import check_plan
from pipeline.run.resolve import resolve
from pipeline.seeding import seed_layer
from pipeline.stage.divergence import Guard
from pipeline.stage.stage import Stage
from tests import problems
from tests.oracle import assert_same
from workers.errors import RunFailed

SGD = OptimizerPlan(rule="sgd", lr=0.05)


class Breaks(nn.Module):
    """An identity; from its n-th training batch on one value is infinite, on the way forward or back."""

    def __init__(self, batch: int, where: str) -> None:
        super().__init__()
        self.left, self.where = batch, where

    def forward(self, x: Tensor) -> Tensor:
        """Count down, then break."""
        if self.training:
            self.left -= 1
        broken = self.left < 0 and self.training
        if broken and self.where == "forward":
            x = x.clone()
            x[0, 0] = math.inf
        if broken and self.where == "backward" and x.requires_grad:
            x.register_hook(_infinite_in_one_place)
        return x


def _infinite_in_one_place(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[0, 0] = math.inf
    return gradient


def _breaking(where: str) -> nn.Sequential:
    """Six layers; what layer 3 passes on breaks in batch 4."""
    width = problems.WIDTH
    linear = [nn.Linear(width, width) for _ in range(4)]
    return nn.Sequential(*linear[:3], Breaks(4, where), linear[3], nn.Linear(width, problems.CLASSES))


def _recipe(model: Callable[[], nn.Module], **changes: Any) -> Any:
    return replace(problems.recipe(), model=model, evaluation=None, **changes)


def _failure(recipe: Any, plan: Plan) -> StageError:
    with pytest.raises(StageError) as caught:
        run_reference(recipe, plan)
    assert isinstance(caught.value.__cause__, FloatingPointError), "so that others can tell it from a bug"
    return caught.value


# ---------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("mode", ["naive", "unlocked", "async-1f1b", "local"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_layer_and_the_batch_are_named_where_it_began(mode: str, where: str) -> None:
    """Split 2 | 4: layer 3 is in stage 1; a backward pass breaks above layer 2, whose bias has it first."""
    error = _failure(_recipe(partial(_breaking, where)), Plan(mode=mode, sizes=(2, 4), steps=9, guard=False))
    assert (error.stage, error.batch) == (1, 4)
    if where == "forward":
        assert error.layer == "3"
        assert "the output is not finite" in str(error)
    else:
        assert error.layer == "2"
        assert "the gradient of 2.bias is not finite; nothing was stepped with it" in str(error)


def test_the_layer_is_named_where_what_travels_is_bf16() -> None:
    """Layers with float32 weights are gone through once more as the stage did: under autocast."""
    plan = Plan(mode="naive", sizes=(2, 4), steps=9, autocast="bf16")
    error = _failure(_recipe(partial(_breaking, "forward")), plan)
    assert (error.stage, error.layer, error.batch) == (1, "3", 4)


def test_the_weights_are_those_before_the_batch_that_broke() -> None:
    recipe, plan = _recipe(partial(_breaking, "backward")), Plan(stages=1, mode="naive", steps=4, optimizer=SGD)
    truth = run_reference(recipe, plan).state_tensors()
    resolved = resolve(recipe, plan)
    stage = Stage(layers_of(build_model(recipe, 0)), 0, resolved.plan, recipe)
    for batch in range(5):
        x, labels = recipe.batch(batch)
        stage.forward(Item(batch), (x,), (labels,))
        if batch < 4:
            stage.backward(Item(batch), None)
            stage.step(batch)
    with pytest.raises(StageError, match=r"stage 0, layer 2, batch 4: .*nothing was stepped"):
        stage.backward(Item(4), None)
    assert_same({name: tensor.detach() for name, tensor in stage.state_tensors().items()}, truth)


def test_inputs_that_are_not_finite_are_not_blamed_on_a_layer() -> None:
    def broken(index: int) -> Any:
        x, labels = problems.batch(index)
        x[3, 2] = math.nan if index == 5 else 0.0
        return x, labels

    error = _failure(_recipe(problems.dropout_and_batch_norm, batches=broken), Plan(steps=9))
    assert (error.stage, error.layer, error.batch) == (0, None, 5)
    assert "what comes in is not finite: look at the inputs of this batch" in str(error)


def test_half_precision_is_summed_in_single_precision() -> None:
    """The sum of these would be infinite in half precision, and none of them is."""
    guard = Guard(Plan(), 0, [])
    guard.activation(0, 0, (torch.ones(4),), (torch.full((64, 64), 1e4, dtype=torch.float16),))
    with pytest.raises(StageError, match="stage 0, batch 1: FloatingPointError: the output is not finite"):
        guard.activation(1, 1, (torch.ones(4),), (torch.full((2, 2), math.inf, dtype=torch.float16),))


def test_a_layer_without_biases_is_looked_at_by_its_first_weight() -> None:
    model = nn.Linear(3, 2, bias=False)
    guard = Guard(Plan(), 0, [Layer(0, "0", model)])
    model.weight.grad = torch.ones(2, 3)
    guard.gradients(0, (torch.ones(3),))
    model.weight.grad[1, 1] = math.nan
    with pytest.raises(StageError, match=r"layer 0, batch 1: .*the gradient of 0\.weight is not finite"):
        guard.gradients(1, (None,))
    model.weight.grad = None
    with pytest.raises(StageError, match=r"stage 0, batch 2: .*the gradient for the stage below is not finite"):
        guard.gradients(2, (None, torch.full((3,), math.nan)))


@pytest.mark.processes
def test_processes_say_the_same(tmp_path: Path) -> None:
    """Nothing that is not finite leaves a stage: else the one below might say first that it got it."""
    source = GivenRecipe(_recipe(partial(_breaking, "backward")))
    with pytest.raises(RunFailed) as caught:
        run(source, resolve_source(source, Plan(sizes=(2, 4), steps=9)), tmp_path, "r", Console(quiet=True))
    assert (caught.value.stage, caught.value.layer, caught.value.batch) == (1, "2", 4)


# ---------------------------------------------------------------- what runs away


def _watched(losses: Sequence[float], plan: Plan | None = None) -> str | None:
    """What a guard says of these losses, if anything."""
    guard = Guard(plan or Plan(), 1, [])
    try:
        for batch, loss in enumerate(losses):
            guard.loss(batch, loss)
    except StageError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "losses",
    [
        [2.3 * 0.99**n for n in range(900)],
        [2.3 * 0.98**n * (40 if n % 37 == 0 else 1) for n in range(600)],
        [2.3] * 10 + [12.0] * 200 + [1.0] * 100,
        [-1.0 - n for n in range(50)] + [500.0],
        [0.0] * 20 + [9.0] * 50,
    ],
    ids=["falls", "spikes", "up and down again", "negative", "zero at first"],
)
def test_a_loss_that_only_jumps_is_left_alone(losses: list[float]) -> None:
    assert _watched(losses) is None


def test_a_loss_ten_times_what_it_began_with_ends_the_run_and_says_since_when() -> None:
    message = _watched([2.0] * 100 + [2.0 * 1.1**n for n in range(60)])
    assert message is not None
    batch = int(message.split("batch ")[1].split(":")[0])
    since = int(message.split("since batch ")[1].split(":")[0])
    assert 100 < since < batch < 160
    assert message.startswith(f"stage 1, batch {batch}: FloatingPointError: the loss runs away: ")
    assert message.endswith("lower the learning rate, or clip (--optimizer.clip 1); --no-guard goes on regardless")
    assert _watched([2.0] * 100 + [2.0 * 1.1**n for n in range(60)], Plan(guard=False)) is None


def test_a_loss_that_explodes_at_once_does_not_wait_for_an_average() -> None:
    assert _watched([2.0] * 12 + [2500.0]) is not None
    assert "the loss is nan" in str(_watched([2.0, math.nan], Plan(guard=False))), "what is not finite always ends it"


def test_a_true_gradient_that_explodes_ends_the_run() -> None:
    guard, ones = Guard(Plan(mode="naive"), 0, []), torch.ones(4, 3)
    for batch in range(10):
        guard.true_gradient(batch, (ones * 1e-5,))
    guard.true_gradient(10, (ones * 0.09,))
    with pytest.raises(StageError, match=r"batch 11: .*the gradient explodes: its root mean square .* is 0\.2, in "):
        guard.true_gradient(11, (ones * 0.2,))
    with pytest.raises(StageError, match=r"batch 12: .*the gradient from above is not finite"):
        guard.true_gradient(12, (ones * math.nan,))


def test_a_locked_stage_is_guarded_before_it_steps() -> None:
    """Below the last stage a true gradient comes; the weights are those before it when it has exploded."""
    plan = Plan(stages=2, warmup_steps=99, optimizer=SGD)
    resolved = resolve(problems.recipe(), plan)
    layers = split(layers_of(build_model(problems.recipe(), 0)), resolved.sizes)[0]
    stage = Stage(layers, 0, resolved.plan, problems.recipe(), resolved.cuts[0])
    for batch in range(12):
        x, labels = problems.batch(batch)
        item = Item(batch)
        h = present(stage.forward(item, (x,), (labels,))[0])
        route = stage.in_flight.of(item).route
        assert route.locked
        stage.predict(item)
        if batch == 11:
            break
        stage.backward(item, (torch.full_like(h, 1e-3),))
        stage.step(batch)
        if route.wants_target:
            stage.learn(item, (torch.full_like(h, 1e-3),))
    before = {name: tensor.detach().clone() for name, tensor in stage.state_tensors().items()}
    with pytest.raises(StageError, match=r"stage 0, batch 11: .*the gradient explodes"):
        stage.backward(item, (torch.full_like(h, 1e3),))
    assert_same({name: tensor.detach() for name, tensor in stage.state_tensors().items()}, before)


def test_gradients_that_begin_at_nothing_are_no_measure() -> None:
    """A last layer that begins with zeros sends zeros down at first."""
    guard = Guard(Plan(mode="naive"), 0, [])
    for batch in range(10):
        guard.true_gradient(batch, (torch.zeros(4, 3),))
    guard.true_gradient(10, (torch.ones(4, 3),))


def test_sgd_that_blows_up_is_caught_before_it_is_not_a_number() -> None:
    plan = Plan(mode="naive", steps=200, optimizer=OptimizerPlan(rule="sgd", lr=1.0))
    error = _failure(_recipe(partial(problems.wide, 4, problems.WIDTH)), plan)
    assert "runs away" in str(error) or "explodes" in str(error)
    unguarded = _failure(_recipe(partial(problems.wide, 4, problems.WIDTH)), replace(plan, guard=False))
    assert unguarded.batch is not None
    assert error.batch is not None
    assert error.batch < unguarded.batch


# ---------------------------------------------------------------- DNIs


def _guard_of_dni(plan: Plan | None = None) -> Guard:
    return Guard(plan or Plan(dni=DNIPlan(form="linear")), 0, [])


def _hold(guard: Guard, prediction: Callable[[Tensor], Tensor], targets: int) -> None:
    """Targets of size 1 for a DNI that predicts this."""
    h, labels = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.int64)
    dni: Any = SimpleNamespace(form=None, predict=lambda h, labels: prediction(h))
    for batch in range(targets):
        guard.target(batch, dni, h, labels, h / h.norm())


def test_a_dni_that_has_gone_silent_is_named() -> None:
    _hold(_guard_of_dni(), torch.zeros_like, 127)
    with pytest.raises(StageError) as caught:
        _hold(_guard_of_dni(), torch.zeros_like, 128)
    assert str(caught.value) == (
        "stage 0, layer DNI, batch 127: FloatingPointError: the DNI has predicted nothing but zeros since batch 15 or "
        "longer, while its targets are not zero; this stage learns nothing: lower its learning rate (--dni.lr 0.0003), "
        "or choose another form (--dni.form); --no-guard goes on regardless"
    )
    _hold(_guard_of_dni(Plan(guard=False)), torch.zeros_like, 900)


def test_a_dni_that_is_wrong_beyond_reason_is_named_and_one_that_is_only_bad_is_not() -> None:
    bad = _guard_of_dni()
    _hold(bad, lambda h: -0.9 * h / h.norm(), 900)  # error 3.6: as large as the target, in the other direction
    with pytest.raises(StageError, match=r"batch 527: .*since batch 287 the error of its predictions is 9 times th"):
        _hold(_guard_of_dni(), lambda h: -2.0 * h / h.norm(), 900)


@pytest.mark.parametrize("outlier", [1.0, 1e5])
@pytest.mark.parametrize(("size", "ends"), [(0.004, False), (0.006, True)], ids=["by heart", "still learning"])
def test_errors_where_the_true_gradient_has_come_to_nothing_are_no_runaway(
    size: float, ends: bool, outlier: float
) -> None:
    """A training set learned by heart leaves rare spikes, which say how large a prediction is, and nothing between."""
    guard, begins = _guard_of_dni(), torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    dni: Any = SimpleNamespace(form=None, predict=lambda h, labels: -3 * h)
    labels = torch.zeros(8, dtype=torch.int64)
    for batch in range(256):
        once = outlier if batch == 127 else 1.0
        guard.target(batch, dni, -begins / 3 * once, labels, begins * once)
    with pytest.raises(StageError, match=r"the error of its predictions is 16 times") if ends else nullcontext():
        for batch in range(256, 900):
            guard.target(batch, dni, begins * size, labels, begins * size)


def test_a_bad_beginning_is_forgiven() -> None:
    """Targets shrink fast at first, and the scale of the DNI follows slowly."""
    guard, wrong = _guard_of_dni(), iter([True] * 16)
    _hold(guard, lambda h: (-3.0 if next(wrong, False) else 1.0) * h / h.norm(), 900)


def test_a_dni_that_has_died_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 of three: the stage below the last one has the true targets."""
    monkeypatch.setattr(DNI, "predict", lambda dni, h, labels: h * (dni._index == 0))
    plan = Plan(stages=3, steps=140, dni=DNIPlan(form="label_residual", every=1))
    error = _failure(problems.recipe(), plan)
    assert (error.stage, error.layer, error.batch) == (1, "DNI", 127)
    assert "nothing but zeros" in str(error)
    assert len(run_reference(problems.recipe(), replace(plan, guard=False)).losses) == 140


def test_a_prediction_that_is_not_finite_is_located_too() -> None:
    plan = Plan(stages=2, steps=60, dni=DNIPlan(form="mlp", lr=1e9))
    error = _failure(problems.recipe(), plan)
    assert (error.stage, error.layer) == (0, "DNI")
    assert error.batch is not None
    assert "lower the DNI's lr" in str(error)


@pytest.mark.parametrize("targets", ["bootstrap", "true"])
def test_a_guard_changes_no_number(targets: str) -> None:
    plan = Plan(stages=3, steps=60, targets=targets, hop_steps=1.0)
    guarded, bare = (run_reference(problems.recipe(), replace(plan, guard=guard)) for guard in (True, False))
    assert_same(guarded.state_tensors(), bare.state_tensors())
    assert guarded.losses == bare.losses


# ---------------------------------------------------------------- clipping


def _clipped(clip: float | None, **options: Any) -> Plan:
    return Plan(steps=12, optimizer=OptimizerPlan(lr=1e-3, clip=clip), **options)


def test_locked_training_with_a_clip_equals_a_loop_that_clips_stage_by_stage() -> None:
    """The norm is the stage's: two stages clip their two halves apart."""
    plan = _clipped(0.05, mode="naive", sizes=(4, 4), stages=2)
    result = run_reference(problems.recipe(), plan)
    model = build_model(problems.recipe(), 0)
    assert isinstance(model, nn.Sequential)
    halves = [list(model[:4].parameters()), list(model[4:].parameters())]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    clipped = 0
    for step in range(12):
        x, labels = problems.batch(step)
        optimizer.zero_grad()
        for index, layer in enumerate(model):
            seed_layer(0, index, step)
            x = layer(x)
        torch.nn.functional.cross_entropy(x, labels).backward()
        clipped += sum(float(nn.utils.clip_grad_norm_(half, 0.05)) > 0.05 for half in halves)
        optimizer.step()
    assert clipped == 24, "every step of this problem is clipped"
    assert_same(result.state_tensors(), dict(model.state_dict()))
    whole = run_reference(problems.recipe(), replace(plan, stages=1, sizes=None)).state_tensors()
    assert any(not torch.equal(whole[name], tensor) for name, tensor in result.state_tensors().items())


@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_a_clip_that_is_never_reached_changes_no_number(mode: str) -> None:
    loose, none = (run_reference(problems.recipe(), _clipped(clip, mode=mode)) for clip in (1e9, None))
    assert_same(loose.state_tensors(), none.state_tensors())


def test_synthetic_gradients_are_clipped_as_true_ones_are() -> None:
    """With plain SGD, a step is never longer than the learning rate times the clip."""
    sgd = OptimizerPlan(rule="sgd", lr=1.0, clip=1e-3)
    plan = Plan(stages=2, steps=40, optimizer=sgd, dni=DNIPlan(every=1))
    resolved = resolve(problems.recipe(), plan)
    layers = split(layers_of(build_model(problems.recipe(), 0)), resolved.sizes)[0]
    stage = Stage(layers, 0, resolved.plan, problems.recipe(), resolved.cuts[0])
    assert stage.dni is not None
    weights = [parameter for layer in layers for parameter in layer.module.parameters()]
    lengths: list[float] = []
    width, seeded = resolved.cuts[0].activation.shape[1], torch.Generator().manual_seed(0)
    top = torch.randn(problems.CLASSES, width, generator=seeded)
    for batch in range(40):
        before = [weight.detach().clone() for weight in weights]
        x, labels = problems.batch(batch)
        item = Item(batch)
        stage.forward(item, (x,), (labels,))
        stage.backward(item, stage.predict(item))
        stage.step(batch)
        stage.learn(item, (F.one_hot(labels, len(top)).float() @ top,))
        steps = [weight.detach() - old for weight, old in zip(weights, before, strict=True)]
        lengths.append(float(nn.utils.get_total_norm(steps)))
    assert max(lengths) <= 1e-3 * (1 + 1e-4)
    assert lengths[-1] == pytest.approx(1e-3, rel=1e-3), "the clip is reached"


def test_quality_compares_gradients_before_they_are_clipped() -> None:
    """The first sampled batch meets the same weights in both runs only if nothing was clipped before: it is batch 0."""
    plan = Plan(stages=2, steps=3, hop_steps=0.0, quality_every=3)
    small = replace(plan, optimizer=OptimizerPlan(lr=1e-12, clip=1e-9))
    loose = replace(plan, optimizer=OptimizerPlan(lr=1e-12))
    ratios = [run_reference(problems.recipe(), each).qualities[0][0].norm_ratio for each in (small, loose)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
    assert ratios[0] > 0


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf])
def test_a_clip_is_a_positive_number(clip: float) -> None:
    with pytest.raises(PlanError, match=r"optimizer\.clip is .*: it must be a positive number, or None\."):
        check_plan(_clipped(clip))


def test_every_user_of_the_optimizer_clips() -> None:
    """The yardsticks of a benchmark build theirs with the same function."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = build_optimizer(OptimizerPlan(rule="sgd", lr=1.0, clip=0.5), [weight])
    assert optimizer is not None
    weight.grad = torch.full((4,), 10.0)
    optimizer.step()
    assert float(weight.detach().norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("sizes", [(2, 3), (4, 1)], ids=["as it is", "softened"])
def test_a_training_set_that_is_learned_by_heart_ends_no_run(sizes: tuple[int, int]) -> None:
    """Its true gradients vanish, and the DNI has to follow: one that stayed as large was once ended by the guard."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 8, generator=generator), torch.arange(16) % 4) for _ in range(2)]
    recipe = Recipe(
        name="by_heart",
        model=lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)),
        batches=batches,
        loss=F.cross_entropy,
    )
    plan = Plan(stages=2, sizes=sizes, steps=700, optimizer=OptimizerPlan(lr=1e-2), dni=DNIPlan(every=1))
    assert run_reference(recipe, plan).losses[-1] < 1e-2  # from 1.4
