"""What a worker builds is what the caller has, or the run is refused before it trains."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Batch, Plan, Recipe
from pipeline.data.recipe import build_model
from pipeline.run.resolve import resolve
from pipeline.run.resolved import Resolved
from pipeline.run.sketch import Sketch, differences

PLAN = Plan(mode="naive", stages=2, steps=2, sizes=(2, 2))


class _Function(nn.Module):
    """A function that no description of the module shows."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _model(hidden: int = 8, bias: float = 0.0, function: Callable[[Tensor], Tensor] = F.relu) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(problems.WIDTH, hidden), nn.BatchNorm1d(hidden), _Function(function), nn.Linear(hidden, 5)
    )
    with torch.no_grad():
        model[3].bias += bias
    return model


def _held_out(scale: float = 1.0) -> list[Batch]:
    return [(torch.randn(4, problems.WIDTH) * scale, torch.zeros(4, dtype=torch.long))]


def _numpy_batch(index: int) -> Batch:
    x = torch.from_numpy(np.random.rand(problems.ROWS, problems.WIDTH).astype(np.float32))
    return x + random.random(), x.argmax(1) % problems.CLASSES


def _flat(index: int) -> Batch:
    return problems.batch(index)[0], torch.zeros(problems.ROWS, dtype=torch.long)


RECIPE = Recipe(name="same", model=_model, batches=problems.batch, loss=F.cross_entropy, evaluation=_held_out)


def _differ(one: Resolved, other: Resolved) -> list[str]:
    return [clause for k in range(2) for clause in differences(one.fingerprints[k], other.fingerprints[k])]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"model": partial(_model, hidden=9)}, "0.weight is [8, 12] float32 here, [9, 12] float32 in the worker"),
        ({"model": partial(_model, bias=1e-3)}, "3.bias: other values in the worker"),
        ({"model": partial(_model, function=torch.tanh)}, "what layer 2 gives: other values in the worker"),
        ({"batches": partial(problems.batch, rows=8)}, "inputs of batch 0 is [16, 12] float32 here, [8, 12]"),
        ({"batches": _flat}, "labels of batch 0: other values in the worker"),
        ({"evaluation": partial(_held_out, 2.0)}, "inputs of held-out batch 0: other values in the worker"),
        ({"evaluation": None}, "inputs of held-out batch 0 is [4, 12] float32 here, not there in the worker"),
        ({"loss": partial(F.cross_entropy, label_smoothing=0.1)}, "the loss of a fixed output is 1.80"),
    ],
    ids=["width", "weights", "activation", "rows", "labels", "held-out", "none held out", "loss"],
)
def test_what_differs_is_named(other: dict[str, object], told: str) -> None:
    """Each of these trained without a word, with what a worker imported in place of what the caller had set."""
    found = _differ(resolve(RECIPE, PLAN), resolve(replace(RECIPE, **other), PLAN))
    assert any(clause.startswith(told) for clause in found), found


def test_a_layer_of_another_kind_is_named() -> None:
    one = resolve(replace(RECIPE, model=partial(problems.wide, 4, problems.WIDTH)), PLAN)
    found = _differ(resolve(RECIPE, PLAN), one)
    assert found[0].startswith("layer 0 is Linear(in_features=12, out_features=8, bias=True) here, Linear(in_feat")


def test_the_same_recipe_builds_the_same_whatever_was_drawn_before() -> None:
    recipe = replace(RECIPE, batches=_numpy_batch, model=problems.dropout_and_batch_norm)
    plan = replace(PLAN, sizes=(4, 4))
    torch.manual_seed(1)
    np.random.seed(1)
    first = resolve(recipe, plan)
    torch.manual_seed(2)
    np.random.seed(2)
    assert _differ(first, resolve(recipe, plan)) == []
    assert _differ(first, resolve(recipe, replace(plan, seed=1))) != []


def test_held_out_batches_may_draw_random_numbers() -> None:
    """They were other ones in every pass over them."""
    assert all(torch.equal(a[0], b[0]) for a, b in zip(RECIPE.held_out(), RECIPE.held_out(), strict=True))


def test_random_numbers_that_do_not_follow_from_the_seed_are_seen() -> None:
    def drawn() -> nn.Sequential:
        return _model(bias=int.from_bytes(os.urandom(4), "little") * 1e-9)

    recipe = replace(RECIPE, model=drawn)
    assert _differ(resolve(recipe, PLAN), resolve(recipe, PLAN)) == ["3.bias: other values in the worker"]


def test_rounding_is_no_difference_and_the_smallest_change_of_weights_is_one() -> None:
    """With other threads, on another processor, a mean over the data rounds differently."""

    def sketch(values: Tensor) -> dict[str, Sketch]:
        layer = nn.Linear(1, 1)
        layer.weight = nn.Parameter(values)
        recipe = replace(RECIPE, model=lambda: nn.Sequential(layer, nn.Linear(300, 5)), evaluation=None)
        recipe = replace(recipe, batches=lambda index: (torch.ones(4, 1), torch.zeros(4, dtype=torch.long)))
        layer.bias = None
        return dict(resolve(recipe, Plan(mode="naive", stages=1, steps=1)).fingerprints[0])

    weight = torch.rand(300, 1) - 0.5
    plain = sketch(weight)
    assert list(differences(plain, sketch(weight * (1 + 1e-7)))) == []
    assert list(differences(plain, sketch(weight.flip(0)))) == ["0.weight: other values in the worker"]
    assert list(differences(plain, sketch(weight + 1e-3))) == ["0.weight: other values in the worker"]


def test_nothing_is_changed_by_looking() -> None:
    """Layers are tried as copies: running means and counters begin where a plain loop begins."""
    counting: list[nn.Module] = []

    def model() -> nn.Sequential:
        counting.append(problems.dropout_and_batch_norm())
        return counting[-1]

    resolve(replace(RECIPE, model=model), replace(PLAN, sizes=(4, 4)))
    again = build_model(replace(RECIPE, model=problems.dropout_and_batch_norm), 0).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in counting[0].state_dict().items())
