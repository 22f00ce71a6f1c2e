"""mlp: a wide perceptron on random data, for measuring speed. It learns nothing, as there is nothing to learn."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from launch.recipes.perceptron import check_activation, perceptron
from launch.recipes.ranges import check_counts
from pipeline import Batch, Recipe

__all__ = ["mlp"]

_CLASSES = 10
_NUM_BATCHES = 8  # made once: the data costs nothing while it is measured


def mlp(
    hidden: int = 1024, layers: int = 8, batch: int = 256, batch_norm: bool = False, activation: str = "relu"
) -> Recipe:
    """A perceptron of equal layers on random data.

    Args:
        hidden: Width of the input and of every hidden layer.
        layers: Layers of hidden x hidden, each with an activation function; a small linear layer to 10 classes follows.
        batch: Rows per batch.
        batch_norm: BatchNorm after every layer but the last.
        activation: Activation function: relu, gelu, silu or tanh.
    """
    check_counts(hidden=hidden, layers=layers, batch=batch)
    check_activation(activation)
    return Recipe(
        name="mlp",
        model=partial(perceptron, hidden, hidden, layers + 1, _CLASSES, batch_norm=batch_norm, activation=activation),
        batches=[_random_batch(index, hidden, batch) for index in range(_NUM_BATCHES)],
        loss=F.cross_entropy,
        steps=40,
    )


def _random_batch(index: int, hidden: int, batch: int) -> Batch:
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(batch, hidden, generator=generator)
    return inputs, torch.randint(_CLASSES, (batch,), generator=generator)
