"""Unlocked training learns: digits through real processes, MNIST in the reference driver with delays. Three seeds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import mean

import pytest

from launch.recipes.mnist import mnist
from launch.setup.recipe_source import NamedRecipe
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import Plan, run_reference

pytestmark = pytest.mark.convergence
SEEDS = (0, 1, 2)


def _accuracy(plan: Plan, runs: Path) -> float:
    source = NamedRecipe("digits", (("seed", plan.seed),))
    accuracy = run(source, resolve_source(source, plan), runs, None, Console(quiet=True)).accuracy
    assert accuracy is not None
    return accuracy


def _locked_accuracy(seed: int) -> float:
    """Of the reference driver, which locked processes equal bit for bit however the layers are split."""
    plan = Plan(mode="naive", stages=2, balance="layers", seed=seed)
    accuracy = run_reference(NamedRecipe("digits", (("seed", seed),))(), plan).scores[-1][1].accuracy()
    assert accuracy is not None
    return accuracy


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_digits_unlocked_is_as_good_as_locked_at_the_same_number_of_steps(tmp_path: Path) -> None:
    """K = 2, 3, 4 with the default options: at least 96 % for every seed, and within 1 point of locked on average."""
    locked = [_locked_accuracy(seed) for seed in SEEDS]
    for stages in (2, 3, 4):
        unlocked = [_accuracy(Plan(stages=stages, seed=seed), tmp_path) for seed in SEEDS]
        assert min(unlocked) >= 0.96, f"K = {stages}: {unlocked}"
        assert mean(unlocked) >= mean(locked) - 0.01, f"K = {stages}: {unlocked} against {locked} locked"


@pytest.mark.timeout(600)
def test_mnist_six_stages_with_a_hop_of_one_step(data_dir: Path) -> None:
    """Six layers, one a stage, 2,000 batches of 256, default options: at most 2.2 % test error."""
    recipe = partial(mnist, data_dir / "mnist")
    result = run_reference(recipe(seed=0), Plan(stages=6, steps=2000, hop_steps=1.0, balance="layers"))
    accuracy = result.scores[-1][1].accuracy()
    assert accuracy is not None
    assert 1 - accuracy <= 0.022
