"""The user's loss: what would learn nothing, or something else than the user thinks, is refused before the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, train_alone
from torch import Tensor, nn

from launch import train
from pipeline import Batch, DNIPlan, Plan, PlanError, Recipe, correct_predictions, run_reference
from pipeline.run.resolve import resolve
from pipeline.run.resolved import Resolved

WIDTH, CLASSES, ROWS = 6, 3, 8
EVERY_MODE = ("naive", "gpipe", "1f1b", "async-1f1b", "local", "unlocked")


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))


def _batch(index: int, rows: int = ROWS) -> Batch:
    inputs = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(index))
    return inputs, inputs[:, :CLASSES].argmax(1)


def _recipe(**parts: Any) -> Recipe:
    return Recipe(**{"name": "small", "model": _model, "batches": _batch, "loss": F.cross_entropy, **parts})


def _resolved(plan: Plan | None = None, **parts: Any) -> Resolved:
    return resolve(_recipe(**parts), plan or Plan(steps=6))


def _refused(plan: Plan | None = None, **parts: Any) -> str:
    with pytest.raises(PlanError) as caught:
        _resolved(plan, **parts)
    (problem,) = caught.value.problems
    return problem


def _said(resolved: Resolved, what: str) -> list[tuple[str, str]]:
    return [(value, why) for name, value, why in resolved.reasons if name == what]


# ---------------------------------------------------------------- what it gives

_SHAPES = "output [8, 3] torch.float32 and labels [8] torch.int64"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (lambda each: each, f"a tensor of shape [8] for {_SHAPES}: reduce it to one number, as .mean() does."),
        (lambda each: each.mean().view(1), f"a tensor of shape [1] for {_SHAPES}: reduce it to one number"),
        (lambda each: each.mean().item(), f"a float for {_SHAPES}: return the tensor itself (without .item())"),
        (lambda each: (each.mean(), {"top": 1}), f"a tuple of 2 for {_SHAPES}: give it back alone, and count right"),
        (lambda each: {"loss": each.mean()}, f"a dict of 1 for {_SHAPES}: give it back alone"),
        (lambda each: None, f"None for {_SHAPES}: return the loss."),
        (lambda each: each.mean().long(), f"a number of torch.int64 for {_SHAPES}: only floating-point numbers"),
        (lambda each: torch.complex(each, each).mean(), f"a number of torch.complex64 for {_SHAPES}: only floating"),
        (lambda each: each.mean() / 0, f"inf for batch 0, {_SHAPES}: look at the inputs and labels"),
        (lambda each: (each.mean() - 1e9).log(), f"nan for batch 0, {_SHAPES}: look at the inputs and labels"),
    ],
    ids=["per row", "[1]", "float", "tuple", "dict", "None", "whole", "complex", "inf", "nan"],
)
def test_what_is_no_number_with_a_gradient_gets_a_sentence_of_its_own(
    changed: Callable[[Tensor], Any], sentence: str
) -> None:
    said = _refused(loss=lambda o, y: changed(F.cross_entropy(o, y, reduction="none")))
    assert said.startswith(f"the loss gives {sentence}")


def test_a_warning_that_the_loss_gives_is_no_error() -> None:
    """Any warning was: torch's of a loss that looks at its own value, of kl_div, of something deprecated."""

    def looks(output: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(output, labels)
        return loss if float(loss) < 100 else loss / 2

    _resolved(loss=looks)


# ---------------------------------------------------------------- what learns nothing


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_a_loss_without_a_gradient_is_refused_in_every_mode(mode: str) -> None:
    """Naive ran to the end and reported success; nothing had been learned."""
    plan = Plan(steps=6, mode=mode)
    assert _refused(plan, loss=lambda o, y: F.cross_entropy(o.detach(), y)).startswith("the loss has no gradient, so")
    with_no_grad = torch.no_grad()(F.cross_entropy)
    assert _refused(plan, loss=with_no_grad).startswith("the loss has no gradient, so nothing would be learned")


def test_a_loss_of_something_else_than_the_output_is_refused() -> None:
    def of_itself(output: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros(1, requires_grad=True).mul(2).sum() + output.detach().sum()

    assert "the loss has something to learn of its own, a tensor [1]" in _refused(loss=of_itself)


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_a_model_with_everything_frozen_is_refused(mode: str) -> None:
    """The optimizer got no parameters and every stage was content."""
    said = _refused(Plan(steps=6, mode=mode), model=lambda: _model().requires_grad_(False))
    assert said.startswith("the model has no parameter that requires a gradient, so nothing would be learned")


class _Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2


class _Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("last", [_Detached(), _Rounded(CLASSES, CLASSES)], ids=["detach", "no_grad"])
def test_a_model_whose_output_does_not_depend_on_its_parameters_is_refused(last: nn.Module) -> None:
    said = _refused(model=lambda: nn.Sequential(*_model(), last, nn.Softmax(1)))
    assert said.startswith("no gradient comes through layer 3 to a parameter that requires one, so nothing would be")


@pytest.mark.parametrize("frozen", [[0], [2]], ids=["below", "above"])
def test_a_stage_with_nothing_to_learn_is_fine(frozen: list[int]) -> None:
    def model() -> nn.Sequential:
        layers = _model()
        for index in frozen:
            layers[index].requires_grad_(False)
        return layers

    plan = Plan(steps=3, mode="naive", sizes=(2, 1))
    truth, _, losses = train_alone(_recipe(model=model), plan) if frozen == [2] else (None, None, None)
    mine = run_reference(_recipe(model=model), plan)
    assert len(mine.losses) == 3
    if truth is not None:
        assert mine.losses == losses
        assert_same(mine.state_tensors(), dict(truth.state_dict()))


# ---------------------------------------------------------------- what it would learn of its own


class Tempered(nn.Module):
    """A loss with a temperature to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output * self.temperature, labels)

    def unused(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels)

    def margin(self, margin: Tensor, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output + margin, labels)


class Smoothed:
    """A callable object with a tensor to learn in a list."""

    def __init__(self) -> None:
        self.weights = [torch.ones(CLASSES, requires_grad=True)]

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output * self.weights[0], labels)


GLOBAL = Tempered()


def _global(output: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = GLOBAL(output, labels)
    return loss


def _over_a_closure() -> Callable[[Tensor, Tensor], Tensor]:
    margin = torch.zeros(CLASSES, requires_grad=True)
    return lambda output, labels: F.cross_entropy(output + margin, labels)


_OWN = [
    (Tempered(), "temperature []"),
    (Tempered().forward, "temperature []"),
    (Tempered().unused, "temperature []"),
    (partial(Tempered()), "temperature []"),
    (partial(Tempered().margin, nn.Parameter(torch.zeros(CLASSES))), "temperature [], argument 0 [3]"),
    (Smoothed(), "weights.0 [3]"),
    (_over_a_closure(), "margin [3]"),
    (_global, "GLOBAL.temperature []"),
    (lambda o, y: F.cross_entropy(o * torch.ones(1, requires_grad=True), y), "a tensor [1]"),
]


@pytest.mark.parametrize(
    ("loss", "named"),
    _OWN,
    ids=["module", "method", "unused", "partial", "argument", "object", "closure", "global", "made"],
)
def test_a_loss_with_something_to_learn_of_its_own_is_refused_by_name(loss: Any, named: str) -> None:
    """A learnable temperature was trained by nobody, and saved by nobody, without a word."""
    for plan in (Plan(steps=6, mode="naive"), Plan(steps=6, stages=1, mode="naive"), Plan(steps=6)):
        said = _refused(plan, loss=loss)
        assert said.startswith(f"the loss has something to learn of its own, {named}, which no stage trains or saves")
        assert said.endswith("make it part of the model's last layer, or freeze it (requires_grad_(False)).")


def test_the_remedy_works_a_temperature_that_is_a_layer_is_learned_and_saved() -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    recipe = _recipe(model=lambda: nn.Sequential(*_model(), Temperature()))
    plan = Plan(steps=5, mode="naive")
    truth, _, _ = train_alone(recipe, plan)
    mine = run_reference(recipe, plan).state_tensors()
    assert mine["3.scale"] != 1
    assert_same(mine, dict(truth.state_dict()))


def test_what_a_loss_has_and_does_not_learn_is_its_own_affair() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
    frozen = Tempered().requires_grad_(False)
    teacher = _model()

    def distilled(output: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(torch.ones(1, WIDTH)).softmax(1)
        return F.cross_entropy(output, labels) + (output.softmax(1) - wanted).square().mean()

    for loss in (weighted, frozen, partial(frozen.margin, torch.ones(CLASSES)), distilled):
        assert len(run_reference(_recipe(loss=loss), Plan(steps=3)).losses) == 3


class Centred(nn.Module):
    """A loss with a running centre: a state that every call changes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(CLASSES))
        self.how = how

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        if self.how == "in place":
            self.centre.lerp_(output.detach().mean(0), 0.1)
        else:
            self.centre = self.centre + 0.1 * output.detach().mean(0)
        return F.cross_entropy(output - self.centre, labels)


@pytest.mark.parametrize("how", ["in place", "a new one"])
def test_a_loss_with_a_state_that_moves_is_refused_by_name(how: str) -> None:
    """Every stage with a DNI had a centre of its own, held-out batches moved it too, and none was saved."""
    loss = Centred(how)
    said = _refused(loss=loss)
    assert said.startswith("the loss changes a state of its own at every call, centre, which no stage keeps: ")
    assert not loss.centre.any(), "it was tried on a copy"


# ---------------------------------------------------------------- a loss that works in place


def _halves(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.mul_(0.5), labels)


def _shifts_labels(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels.add_(1).remainder_(CLASSES))


def _held_out() -> Iterator[Batch]:
    yield _batch(100)
    yield _batch(101, rows=3)


_HELD_OUT = [_batch(100), _batch(101, rows=3)]


@pytest.mark.parametrize("loss", [_halves, _shifts_labels], ids=["output", "labels"])
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_a_loss_that_works_in_place_gets_copies(mode: str, loss: Callable[..., Tensor]) -> None:
    """Unlocked, torch refused it inside the DNI; labels that it changed were what was counted as right afterwards."""

    def plainly(output: Tensor, labels: Tensor) -> Tensor:
        return loss(output.clone(), labels.clone())

    plan = Plan(steps=6, mode=mode, targets="true" if mode == "unlocked" else "bootstrap")
    rest: dict[str, Any] = {"evaluation": lambda: iter(_HELD_OUT), "correct": correct_predictions}
    mine, truth = (run_reference(_recipe(loss=each, **rest), plan) for each in (loss, plainly))
    assert mine.losses == truth.losses
    assert_same(mine.state_tensors(), truth.state_tensors())
    assert mine.scores[-1][1] == truth.scores[-1][1]
    assert torch.equal(_HELD_OUT[0][1], _batch(100)[1])


def test_a_loss_in_place_on_an_output_that_the_last_layer_still_needs() -> None:
    """Sigmoid keeps its output for the backward pass: batch 0 failed, after all checks had passed."""

    def doubled(output: Tensor, labels: Tensor) -> Tensor:
        return output.mul_(2).sub(F.one_hot(labels, CLASSES)).square().mean()

    recipe = _recipe(model=lambda: nn.Sequential(*_model(), nn.Sigmoid()), loss=doubled)
    assert len(run_reference(recipe, Plan(steps=3, mode="naive")).losses) == 3


@pytest.mark.parametrize("mode", ["local", "unlocked"])
def test_worker_processes_give_it_copies_too(mode: str, tmp_path: Path) -> None:
    plan = Plan(steps=6, mode=mode, deterministic=mode == "unlocked", sizes=(2, 1))
    mine = train(model=_model, batches=_batch, loss=_halves, plan=plan, runs=tmp_path, quiet=True)
    truth = run_reference(_recipe(loss=_halves), plan)
    assert mine.losses == truth.losses


# ---------------------------------------------------------------- a loss of whole batches

_MANY = 160


def _asserts(output: Tensor, labels: Tensor) -> Tensor:
    if len(output) != _MANY:
        raise ValueError(f"{len(output)} rows")
    return F.cross_entropy(output, labels)


def _contrasts(output: Tensor, labels: Tensor) -> Tensor:
    """Two views of everything, one behind the other: each against all of the other half."""
    one, other = F.normalize(output, dim=1).chunk(2)
    return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(one)))


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (_asserts, "the DNIs train on all rows: it does not take 128 rows (128 rows)"),
        (_contrasts, "the DNIs train on all rows: what it says of a row depends on the other rows"),
    ],
    ids=["fixed", "contrastive"],
)
def test_a_loss_of_whole_batches_has_the_dni_train_on_them(loss: Callable[..., Tensor], why: str) -> None:
    """The DNI called it on 128 rows: an assertion failed in batch 0, named as the layer DNI."""
    recipe = _recipe(loss=loss, batches=partial(_batch, rows=_MANY))
    mine = run_reference(recipe, Plan(steps=20, stages=3))
    assert _said(mine.resolved, "loss") == [("whole batches", why)]
    assert len(mine.losses) == 20
    assert "leave dni.rows out" in _refused(
        Plan(steps=6, dni=DNIPlan(rows=0.5)), loss=loss, batches=partial(_batch, rows=_MANY)
    )
    for plan in (Plan(steps=6, mode="naive"), Plan(steps=6, mode="local"), Plan(steps=6, dni=DNIPlan(form="linear"))):
        assert not _said(_resolved(plan, loss=loss, batches=partial(_batch, rows=_MANY)), "loss")


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1]), label_smoothing=0.1),
        lambda o, y: F.cross_entropy(o, y.where(y > 0, -100)),
        lambda o, y: F.mse_loss(o, F.one_hot(y, CLASSES).float()),
        lambda o, y: F.cross_entropy(o, y) + 0.1 * o.square().mean(),
    ],
    ids=["plain", "weighted", "ignoring", "squares", "penalty"],
)
def test_a_mean_over_the_rows_is_taught_from_a_part_of_them_as_before(loss: Callable[..., Tensor]) -> None:
    resolved = _resolved(loss=loss, batches=partial(_batch, rows=_MANY))
    assert not _said(resolved, "loss")
    assert not resolved.cuts[0].whole_batches


@pytest.mark.parametrize("mode", ["gpipe", "1f1b"])
def test_a_loss_that_does_not_take_a_microbatch_is_refused(mode: str) -> None:
    plan = Plan(steps=6, mode=mode, microbatches=2)
    said = _refused(plan, loss=_asserts, batches=partial(_batch, rows=_MANY))
    assert said.startswith("the loss does not take the 80 rows of a microbatch (80 rows): choose mode naive, or a")
    resolved = _resolved(plan, loss=_contrasts, batches=partial(_batch, rows=_MANY))
    ((value, why),) = _said(resolved, "loss")
    assert (value, why.endswith("so this is not the loss of whole batches")) == ("by microbatch", True)


def test_a_loss_that_does_not_take_the_last_held_out_batch_is_refused() -> None:
    """It failed at the first look at the held-out data: after the last batch, where nobody asks for more looks."""
    rest = {"loss": _asserts, "batches": partial(_batch, rows=_MANY)}
    said = _refused(evaluation=lambda: [_batch(100, _MANY), _batch(101, 7)], **rest)
    assert said.startswith("evaluation batch 1 has 7 rows, which the loss does not take (7 rows): leave it out, or")


def test_an_output_with_other_rows_than_the_labels_is_left_alone() -> None:
    """Tokens in a line: the first rows of the output do not belong to the first rows of the labels."""

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Flatten(0, 1), nn.Linear(WIDTH, CLASSES))

    def batches(index: int, rows: int = ROWS) -> Batch:
        inputs = torch.randn(rows, 4, WIDTH, generator=torch.Generator().manual_seed(index))
        return inputs, inputs[..., :CLASSES].argmax(-1)

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels.flatten())

    rest: dict[str, Any] = {"model": model, "loss": loss, "batches": batches}
    plan = Plan(steps=3, mode="gpipe", microbatches=2)
    assert len(run_reference(_recipe(evaluation=lambda: [batches(9, 3)], **rest), plan).losses) == 3
