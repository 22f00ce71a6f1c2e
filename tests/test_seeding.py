"""Every random number follows from (seed, what it is for): not from the process, nor from what ran before."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline import Batch, Plan, Recipe, run_reference
from pipeline.data.recipe import build_model
from pipeline.run.resolve import resolve
from pipeline.seeding import derived_seed, seed_layer, seeded

PURPOSES: tuple[tuple[int | str, ...], ...] = (
    ("weights",),
    ("batch", 0),
    ("batch", 1),
    ("epoch", 0),
    ("layer", 0, 1),
    ("layer", 1, 0),
    ("layer", 10),
    ("dni", 0),
    ("dni rows", 0, 0),
    ("windows", 0),
)
LAYER_2_BATCH_31 = 4_248_560_518_535_855_466  # with seed 7


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def _batch(index: int) -> Batch:
    """Uses the global generator, as augmentations do."""
    inputs = torch.randn(6, 4)
    return inputs, inputs[:, :3].argmax(1)


RECIPE = Recipe(name="seeds", model=_model, batches=_batch, loss=F.cross_entropy)


# ---------------------------------------------------------------- seeds


def test_every_seed_and_purpose_has_a_seed_of_its_own() -> None:
    seeds = {derived_seed(seed, *purpose) for seed, purpose in product(range(20), PURPOSES)}
    assert len(seeds) == 20 * len(PURPOSES)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63), purpose=st.lists(st.integers(0, 10**6) | st.text("ab:0", max_size=4), max_size=3))
def test_a_seed_is_one_that_torch_takes(seed: int, purpose: list[int | str]) -> None:
    value = derived_seed(seed, *purpose)
    assert 0 <= value < 2**63
    assert value == derived_seed(seed, *purpose)
    torch.Generator().manual_seed(value)


def test_seeds_are_the_same_in_every_process_and_release() -> None:
    """Whatever PYTHONHASHSEED says; and a number written down, for who repeats a run next year."""
    code = "from pipeline.seeding import derived_seed; print(derived_seed(7, 'layer', 2, 31))"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert int(process.stdout) == derived_seed(7, "layer", 2, 31) == LAYER_2_BATCH_31


# ---------------------------------------------------------------- the global generator


def test_a_seeded_block_leaves_the_global_generator_as_it_was() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with seeded(0, "weights"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(100)
    with seeded(0, "weights"):
        assert torch.equal(torch.rand(3), first)
    with seeded(1, "weights"):
        assert not torch.equal(torch.rand(3), first)


def test_a_seeded_block_that_fails_leaves_it_as_it_was_too() -> None:
    def fail() -> None:
        with seeded(0, "weights"):
            torch.rand(3)
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_may_stand_in_each_other() -> None:
    with seeded(0, "outer"):
        alone = torch.rand(2)
    with seeded(0, "outer"):
        with seeded(0, "inner"):
            torch.rand(5)
        assert torch.equal(torch.rand(2), alone)


def _drawn() -> list[float]:
    """One number from every global generator."""
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def test_numpy_and_random_are_seeded_like_torch() -> None:
    """Batches that drew from numpy were the same in all replicas: every worker is forked with one state of it."""
    with seeded(0, "batch", 3):
        first = _drawn()
    with seeded(0, "batch", 4):
        assert not set(first) & set(_drawn())
    np.random.seed(9)
    random.seed(9)
    torch.manual_seed(9)
    expected = [_drawn(), _drawn()]
    np.random.seed(9)
    random.seed(9)
    torch.manual_seed(9)
    assert _drawn() == expected[0]
    with seeded(0, "batch", 3):
        assert _drawn() == first
        with seeded(0, "batch", 4), pytest.raises(KeyError), seeded(0, "batch", 5):
            raise KeyError
    assert _drawn() == expected[1]


def test_numpy_and_random_give_the_same_in_every_process() -> None:
    code = (
        "import random, numpy; from pipeline.seeding import seeded\n"
        "with seeded(7, 'batch', 1): print(numpy.random.randint(10**9), random.randrange(10**9))"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    with seeded(7, "batch", 1):
        assert list(map(int, process.stdout.split())) == [np.random.randint(10**9), random.randrange(10**9)]


def test_building_and_resolving_leave_it_as_it_was() -> None:
    """A user's own random numbers do not depend on whether a model was built in between."""
    recipe = Recipe(name="list", model=_model, batches=[_batch(0)], loss=F.cross_entropy)
    before = torch.get_rng_state()
    build_model(recipe, seed=3)
    resolve(recipe, Plan(stages=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_follow_from_the_seed_alone() -> None:
    first = build_model(RECIPE, seed=3).state_dict()
    torch.manual_seed(77)
    again, other = build_model(RECIPE, seed=3).state_dict(), build_model(RECIPE, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_layer_gives_the_same_numbers_for_the_same_batch_whatever_ran_before() -> None:
    def drawn(layer: int, batch: int) -> list[float]:
        seed_layer(0, layer, batch)
        return torch.rand(4).tolist()

    first = [drawn(layer, batch) for layer, batch in product(range(3), range(3))]
    again = [drawn(layer, batch) for layer, batch in reversed(list(product(range(3), range(3))))]
    assert first == again[::-1]
    assert len({tuple(numbers) for numbers in first}) == 9


def test_a_run_repeats_whatever_the_global_generator_was() -> None:
    """Weights, dropout and batches that draw from the global generator; any number of stages gives the same batches."""
    torch.manual_seed(1)
    first = run_reference(RECIPE, Plan(mode="naive", stages=1, steps=6)).losses
    torch.manual_seed(2)
    assert run_reference(RECIPE, Plan(mode="naive", stages=3, steps=6)).losses == first
    assert run_reference(RECIPE, Plan(mode="naive", stages=3, steps=6, seed=1)).losses != first
