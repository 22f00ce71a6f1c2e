"""digits: the 1,797 handwritten digits of 8x8 pixels that scikit-learn carries (UCI ML repository). No download."""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64

from launch.recipes.perceptron import image_recipe, perceptron
from launch.recipes.ranges import check_counts
from pipeline import Batch, PlanError, Recipe

__all__ = ["digits"]

_PIXELS = 64
_NUM_TRAIN = 1347  # three quarters; the rest is held out


def digits(hidden: int = 512, layers: int = 6, batch: int = 128, seed: int = 0) -> Recipe:
    """A perceptron on scikit-learn's digits.

    Args:
        hidden: Units per hidden layer.
        layers: Layers, the last one included.
        batch: Rows per batch.
        seed: Seed of the order of the data; on the command line the seed of the plan.
    """
    check_counts(hidden=hidden, layers=layers, batch=batch)
    model = partial(perceptron, _PIXELS, hidden, layers, 10)
    return image_recipe("digits", model, _part, batch, seed, steps=300)


def _part(part: str) -> Batch:
    inputs, labels = _data()
    return (inputs[:_NUM_TRAIN], labels[:_NUM_TRAIN]) if part == "train" else (inputs[_NUM_TRAIN:], labels[_NUM_TRAIN:])


@cache
def _data() -> Batch:
    rows = _table()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(rows[:, :_PIXELS], dtype=torch.float32)[order] / 16.0
    return inputs, torch.tensor(rows[:, _PIXELS], dtype=torch.int64)[order]


def _table() -> Float64[np.ndarray, "rows 65"]:
    """Pixels 0 to 16 and the digit, from scikit-learn's file: to import the package takes every worker a second."""
    try:
        package = importlib.util.find_spec("sklearn")
    except ValueError:  # somebody has put something else in its place
        package = None
    if package is None or package.origin is None:
        raise PlanError("the digits come with scikit-learn, which is not installed: pip install 'freewheel[digits]'.")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        return np.loadtxt(file, delimiter=",")
    except FileNotFoundError:  # another version may keep it elsewhere
        from sklearn.datasets import load_digits

        found = load_digits()
        return np.column_stack([found.data, found.target])
