"""cnn: a small convolutional network on images: the digits that scikit-learn carries, or MNIST from a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import nn

from launch.recipes.digits import digits
from launch.recipes.mnist import mnist
from launch.recipes.ranges import check_counts
from pipeline import Batch, Recipe

__all__ = ["cnn"]


def cnn(data: Path | None = None, width: int = 16, batch: int = 128, batch_norm: bool = True, seed: int = 0) -> Recipe:
    """Four convolutions and a linear layer, on 8x8 digits or MNIST.

    Args:
        data: Folder of the MNIST files, as for mnist; default: scikit-learn's digits of 8x8 pixels.
        width: Channels of the first convolution; the second has twice as many, the others four times.
        batch: Rows per batch.
        batch_norm: BatchNorm after every convolution.
        seed: Seed of the order of the data; on the command line the seed of the plan.
    """
    check_counts(width=width, batch=batch)
    flat = digits(batch=batch, seed=seed) if data is None else mnist(data, batch=batch, seed=seed)
    side, evaluation = 8 if data is None else 28, flat.evaluation
    assert callable(evaluation), "both have held-out images"
    assert callable(flat.batches), "both are functions of the index"
    return Recipe(
        name="cnn",
        model=partial(convolutions, side, width, 10, batch_norm=batch_norm),
        batches=partial(_batch, flat.batches, side),
        loss=F.cross_entropy,
        evaluation=partial(_held_out, evaluation, side),
        correct=flat.correct,
        steps=300 if data is None else 1000,
    )


def convolutions(side: int, width: int, classes: int, *, batch_norm: bool = True) -> nn.Sequential:
    """Blocks of 3x3 convolution, (BatchNorm,) ReLU, most of which halve the image; then a linear layer.

    Input [batch, 1, side, side], output [batch, classes]. From side 28: 14, 7, 4, 4; from side 8: 8, 4, 2, 2.
    """
    widths = [1, width, 2 * width, 4 * width, 4 * width]
    strides = [2 if side >= 16 else 1, 2, 2, 1]
    blocks = []
    for into, out, stride in zip(widths, widths[1:], strides, strict=False):
        norm = [nn.BatchNorm2d(out)] if batch_norm else []
        blocks.append(nn.Sequential(nn.Conv2d(into, out, 3, stride=stride, padding=1), *norm, nn.ReLU()))
        side = -(-side // stride)
    return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * side**2, classes)))


def _batch(flat: Callable[[int], Batch], side: int, index: int) -> Batch:
    return _as_images(flat(index), side)


def _held_out(flat: Callable[[], Iterable[Batch]], side: int) -> Iterable[Batch]:
    return (_as_images(batch, side) for batch in flat())


def _as_images(batch: Batch, side: int) -> Batch:
    """Inputs [batch, side * side] -> [batch, 1, side, side]."""
    return batch[0].reshape(-1, 1, side, side), batch[1]
