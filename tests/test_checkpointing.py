"""Activation checkpointing in a stage gives the numbers of the same layers without it, in every mode; or is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import problems
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline import OptimizerPlan, Plan, PlanError, Recipe, run_reference
from pipeline.data.recipe import build_model

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in evaluation
UNLOCKED: dict[str, Any] = {"mode": "unlocked"}
PLANS: list[dict[str, Any]] = [
    {"mode": "naive"},
    {"mode": "gpipe", "microbatches": 2},
    {"mode": "1f1b", "microbatches": 2},
    {"mode": "async-1f1b"},
    {"mode": "local"},
    UNLOCKED,
]
IN_PARTS: list[dict[str, Any]] = [
    {**UNLOCKED, "targets": "true"},
    {**UNLOCKED, "targets": "mixed"},
    {**UNLOCKED, "quality_every": 3},
    {**UNLOCKED, "unlock": "auto", "quality_every": 2},
]


class Block(nn.Module):
    """Two linear layers with dropout between them."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        width = problems.WIDTH
        self.layers = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.3), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Checkpointed, if that is asked for."""
        if self.reentrant is None:
            return self.layers(x)  # type: ignore[no-any-return]
        return checkpoint(self.layers, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def _model(reentrant: bool | None) -> nn.Sequential:
    first = nn.Linear(problems.WIDTH, problems.WIDTH)
    return nn.Sequential(first, *(Block(reentrant) for _ in range(3)), nn.Linear(problems.WIDTH, problems.CLASSES))


def _run(reentrant: bool | None, plan: dict[str, Any]) -> Any:
    model = partial(_model, reentrant)
    recipe = Recipe(
        name="blocks", model=model, batches=problems.batch, loss=F.cross_entropy, evaluation=problems.held_out
    )
    return run_reference(recipe, Plan(steps=12, stages=3, evaluate_every=5, **plan))


def _check(reentrant: bool, plan: dict[str, Any]) -> None:
    mine, truth = _run(reentrant, plan), _run(None, plan)
    assert_same(mine.state_tensors(), truth.state_tensors())
    assert_same(mine.optimizer_tensors(), truth.optimizer_tensors())
    assert (mine.losses, mine.scores) == (truth.losses, truth.scores)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_number(reentrant: bool, plan: dict[str, Any]) -> None:
    """Reentrant, async-1f1b and local once left the layers at their initial values; else async-1f1b computed anew on
    the weights of today, and without dropout where held-out batches had come between.
    """
    _check(reentrant, plan)


@pytest.mark.parametrize("plan", IN_PARTS, ids=str)
def test_checkpointing_that_is_not_reentrant_may_be_gone_through_in_parts(plan: dict[str, Any]) -> None:
    _check(False, plan)


@pytest.mark.parametrize("plan", IN_PARTS, ids=str)
def test_reentrant_checkpointing_is_refused_where_gradients_are_taken_in_parts(plan: dict[str, Any]) -> None:
    """torch raises in the middle of a run."""
    with pytest.raises(
        PlanError, match=r"layer 1 is checkpointed with use_reentrant=True, .*: choose use_reentrant=False"
    ):
        _run(True, plan)


def _embeds() -> nn.Sequential:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.table, x, use_reentrant=True)  # type: ignore[no-any-return]

    return nn.Sequential(Embeds(), nn.Flatten(), nn.Linear(24, 5))


def _begins() -> nn.Sequential:
    return nn.Sequential(Block(True), nn.Linear(problems.WIDTH, problems.CLASSES))


def _is_frozen_below() -> nn.Sequential:
    return nn.Sequential(nn.Linear(problems.WIDTH, problems.WIDTH).requires_grad_(False), *_begins())


@pytest.mark.parametrize(("model", "layer"), [(_begins, 0), (_is_frozen_below, 1)])
def test_reentrant_checkpointing_where_nothing_below_learns_is_refused(model: Any, layer: int) -> None:
    """What comes in needs no gradient, so torch trains nothing in the layer, and only warns."""
    recipe = Recipe(name="begins", model=model, batches=problems.batch, loss=F.cross_entropy)
    with pytest.raises(PlanError, match=f"layer {layer} is checkpointed with use_reentrant=True, and what comes in"):
        run_reference(recipe, Plan(stages=2, steps=2))


def test_reentrant_checkpointing_of_integers_is_refused() -> None:
    """The same."""
    batch = torch.randint(5, (4, 3)), torch.randint(5, (4,))
    recipe = Recipe(name="tokens", model=_embeds, batches=[batch], loss=F.cross_entropy)
    with pytest.raises(PlanError, match="layer 0 is checkpointed with use_reentrant=True, and what comes in"):
        run_reference(recipe, Plan(stages=2, steps=2))


# ---------------------------------------------------------------- what else hangs on the parameters themselves


def _smaller(gradient: Tensor) -> Tensor:
    return gradient * 0.5


def _halves(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def _hooked(kind: str) -> nn.Sequential:
    model = problems.eight_linear()
    for parameter in model.parameters() if kind else []:
        if kind == "gradient":
            parameter.register_hook(_smaller)
        else:
            parameter.register_post_accumulate_grad_hook(_halves)
    return model


def _data(index: int) -> tuple[Tensor, Tensor]:
    inputs, labels = problems.batch(index, width=6)
    return inputs, labels % 3


@pytest.mark.parametrize("kind", ["gradient", "accumulated"])
def test_hooks_on_gradients_work_on_stashed_weights_too(kind: str) -> None:
    """They were left out by async-1f1b: under plain SGD halved gradients are half the step."""
    moved = []
    for each in ("", kind):
        recipe = Recipe(name="hooked", model=partial(_hooked, each), batches=_data, loss=F.cross_entropy)
        plan = Plan(mode="async-1f1b", stages=2, steps=1, optimizer=OptimizerPlan(rule="sgd"))
        trained = run_reference(recipe, plan).state_tensors()
        begun = dict(build_model(recipe, plan.seed).named_parameters())
        moved.append({name: trained[name] - begun[name].detach() for name in trained})
    for name, plain in moved[0].items():
        torch.testing.assert_close(moved[1][name], plain / 2, rtol=1e-3, atol=1e-7)


class Twice(nn.Module):
    """One module in two places."""

    def __init__(self) -> None:
        super().__init__()
        one = nn.Linear(problems.WIDTH, problems.WIDTH)
        self.layers = nn.Sequential(one, nn.Tanh(), one)

    def forward(self, x: Tensor) -> Tensor:
        """In a row."""
        return self.layers(x)  # type: ignore[no-any-return]


class Counts(nn.Module):
    """Replaces its buffer by one that is larger by one, as does who writes `self.count = self.count + 1`."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Count."""
        if self.training:
            self.count = self.count + 1
        return x


def _special() -> nn.Sequential:
    return nn.Sequential(Twice(), Counts(), nn.Linear(problems.WIDTH, problems.CLASSES))


def test_stashed_weights_are_taken_out_again() -> None:
    """A module that stands twice in a layer once kept the copies of its first batch, and a replaced buffer was lost."""
    recipe = Recipe(name="special", model=_special, batches=problems.batch, loss=F.cross_entropy)
    plan = Plan(mode="async-1f1b", stages=2, sizes=(2, 1), steps=5)
    trained = run_reference(recipe, plan)
    begun = dict(build_model(recipe, plan.seed).named_parameters())
    assert trained.state_tensors()["1.count"] == 5
    assert isinstance(trained.stages[0].layers[0].module.get_parameter("layers.0.weight"), nn.Parameter)
    assert not torch.equal(trained.state_tensors()["0.layers.0.weight"], begun["0.layers.0.weight"])
