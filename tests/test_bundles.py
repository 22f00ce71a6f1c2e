"""Layers that give and take several tensors: what crosses a cut is a bundle, and training is the plain loop's.

The oracle is a loop over the unsplit model, every layer seeded by itself, as in tests/oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch import train
from pipeline import Batch, Plan, PlanError, Recipe, run_reference
from tests.oracle import assert_same, train_alone

WIDTH, CLASSES, ROWS = 8, 5, 12
Pair = tuple[Tensor, Tensor]


class Masked(nn.Module):
    """x -> (x, which of its numbers are positive): a bool tensor rides along."""

    def forward(self, x: Tensor) -> Pair:
        return x, x > 0


class Counted(nn.Module):
    """x -> (x, the place of the largest number of each row): whole numbers ride along."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Pair:
        return self.linear(x), x.argmax(1)


class BesideMask(nn.Module):
    """(x, mask) -> the same, x through a layer where the mask is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, pair: Pair) -> Pair:
        x, mask = pair
        return x + self.dropout(self.linear(x) * mask), mask


class BesideCount(nn.Module):
    """(x, places) -> the same, x with what a table has for the places."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: Pair) -> Pair:
        x, places = pair
        return self.linear(x) + self.table(places), places


class Forked(nn.Module):
    """x -> two tensors that both want a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Pair:
        return self.left(x).relu(), self.right(x).tanh()


class Crossed(nn.Module):
    """(a, b) -> (a + f(b), b): a residual stream with a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: Pair) -> Pair:
        a, b = pair
        return a + self.linear(b), b


class WithAPlaceToSpare(nn.Module):
    """(a, b) -> (a, None, b)."""

    def forward(self, pair: Pair) -> tuple[Tensor, None, Tensor]:
        a, b = pair
        return a, None, b


class WithoutIt(nn.Module):
    """(a, None, b) -> (a, b)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, three: tuple[Tensor, None, Tensor]) -> Pair:
        a, nothing, b = three
        assert nothing is None
        return self.linear(a), b


class Joined(nn.Module):
    """(x, what rides along) -> classes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, pair: Pair) -> Tensor:
        x, other = pair
        return self.linear(x + other if other.is_floating_point() else x)


def masked() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Masked(), BesideMask(), BesideMask(), Joined())


def counted() -> nn.Sequential:
    return nn.Sequential(Counted(), BesideCount(), BesideCount(), Joined())


def forked() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Forked(), Crossed(), Crossed(), Joined())


def spare() -> nn.Sequential:
    return nn.Sequential(Forked(), Crossed(), WithAPlaceToSpare(), WithoutIt(), Joined())


MODELS = (masked, counted, forked, spare)


def batch(index: int) -> Batch:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)


def recipe(model: Callable[[], nn.Sequential]) -> Recipe:
    return Recipe(name="bundles", model=model, batches=batch, loss=F.cross_entropy)


MODES: dict[str, dict[str, Any]] = {
    "naive": {"mode": "naive"},
    "gpipe": {"mode": "gpipe", "microbatches": 3},
    "1f1b": {"mode": "1f1b", "microbatches": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_split_at_every_cut_it_is_the_plain_loop_bit_for_bit(model: Callable[[], nn.Sequential], mode: str) -> None:
    plan = Plan(stages=len(model()), steps=4, **MODES[mode])
    truth, _, losses = train_alone(recipe(model), plan)
    mine = run_reference(recipe(model), plan)
    assert_same(mine.state_tensors(), dict(truth.state_dict()))
    assert mine.losses == losses


@pytest.mark.parametrize("model", MODELS)
def test_two_stages_cut_anywhere_are_the_plain_loop(model: Callable[[], nn.Sequential]) -> None:
    layers, plan = len(model()), Plan(mode="naive", steps=3)
    truth, _, losses = train_alone(recipe(model), plan)
    for cut in range(1, layers):
        mine = run_reference(recipe(model), Plan(mode="naive", steps=3, sizes=(cut, layers - cut)))
        assert_same(mine.state_tensors(), dict(truth.state_dict()))
        assert mine.losses == losses


@pytest.mark.parametrize("model", MODELS)
def test_late_gradients_find_the_weights_that_they_belong_to(model: Callable[[], nn.Sequential]) -> None:
    """async-1f1b on stashed weights: with one batch open at a time it is the plain loop, with several it still learns
    from every batch."""
    plan = Plan(mode="async-1f1b", stages=len(model()), steps=6)
    first, again = (run_reference(recipe(model), plan) for _ in range(2))
    assert_same(first.state_tensors(), again.state_tensors())
    truth, _, losses = train_alone(recipe(model), Plan(steps=1))
    assert first.losses[0] == losses[0]
    alone = run_reference(recipe(model), Plan(mode="async-1f1b", stages=len(model()), steps=1))
    assert_same(alone.state_tensors(), dict(truth.state_dict()))


@pytest.mark.parametrize("mode", ["unlocked", "local"])
@pytest.mark.parametrize("model", [forked, spare])
def test_a_dni_predicts_for_one_tensor_and_says_so(model: Callable[[], nn.Sequential], mode: str) -> None:
    """Behind the layer that forks, two tensors want a gradient."""
    said = rf"layer \d gives 2 tensors of floating-point numbers, and in mode {mode} one crosses a cut: cut elsewhere"
    with pytest.raises(PlanError, match=said):
        run_reference(recipe(model), Plan(mode=mode, stages=len(model()), steps=1))


@pytest.mark.parametrize("mode", ["unlocked", "local"])
@pytest.mark.parametrize("model", [masked, counted])
def test_what_has_no_gradient_rides_along_in_every_mode(model: Callable[[], nn.Sequential], mode: str) -> None:
    result = run_reference(recipe(model), Plan(mode=mode, stages=len(model()), steps=6))
    assert len(result.losses) == 6


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("channels", "model"), [("shm", masked), ("gloo", spare)])
def test_processes_give_each_other_bundles(channels: str, model: Callable[[], nn.Sequential], tmp_path: Path) -> None:
    plan: Any = Plan(mode="naive", stages=3, balance="layers", steps=4, channels=channels)  # type: ignore[arg-type]
    mine = train(model=model, batches=batch, loss=F.cross_entropy, plan=plan, runs=tmp_path, quiet=True)
    truth, _, losses = train_alone(recipe(model), plan)
    assert_same(mine.state_tensors(), dict(truth.state_dict()))
    assert mine.losses == losses
