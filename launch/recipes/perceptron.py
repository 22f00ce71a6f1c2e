"""The perceptron that digits, mnist and mlp train, and the recipe of those that have images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch.nn.functional as F
from torch import nn

from pipeline import ArrayBatches, Batch, PlanError, Recipe, correct_predictions, nearest

__all__ = ["check_activation", "image_recipe", "perceptron"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
_Data = Callable[[str], Batch]


def image_recipe(name: str, model: Callable[[], nn.Module], data: _Data, batch: int, seed: int, steps: int) -> Recipe:
    """A classifier of images in memory; ``data``: ``train`` or ``t10k``, the held-out part -> its images and labels."""
    return Recipe(
        name=name,
        model=model,
        batches=partial(_train, data, batch, seed),
        loss=F.cross_entropy,
        evaluation=partial(_held_out, data, batch),
        correct=correct_predictions,
        steps=steps,
    )


def _train(data: _Data, batch: int, seed: int, index: int) -> Batch:
    return ArrayBatches(*data("train"), batch, seed)(index)


def _held_out(data: _Data, batch: int) -> Iterable[Batch]:
    inputs, labels = data("t10k")
    return zip(inputs.split(batch), labels.split(batch), strict=True)


def perceptron(
    inputs: int, hidden: int, layers: int, classes: int, *, batch_norm: bool = False, activation: str = "relu"
) -> nn.Sequential:
    """``layers`` layers: each but the last is Linear, (BatchNorm1d,) activation; the last is Linear.

    Input [batch, inputs], output [batch, classes].
    """
    blocks: list[nn.Module] = []
    for index in range(layers - 1):
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        linear = nn.Linear(inputs if index == 0 else hidden, hidden)
        blocks.append(nn.Sequential(linear, *norm, _ACTIVATIONS[activation]()))
    return nn.Sequential(*blocks, nn.Linear(hidden if layers > 1 else inputs, classes))


def check_activation(activation: str) -> None:
    """Refuse an activation function that is not known."""
    if activation not in _ACTIVATIONS:
        raise PlanError(nearest(activation, _ACTIVATIONS, "activation"))
