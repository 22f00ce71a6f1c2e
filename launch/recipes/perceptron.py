"""The perceptron that digits, mnist and mlp train."""

from __future__ import annotations

from torch import nn

from pipeline import PlanError, nearest

__all__ = ["ACTIVATIONS", "check_activation", "perceptron"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
"""Activation functions by the name that an option gives."""


def perceptron(
    inputs: int, hidden: int, layers: int, classes: int, *, batch_norm: bool = False, activation: str = "relu"
) -> nn.Sequential:
    """``layers`` layers: each but the last is Linear, (BatchNorm1d,) activation; the last is Linear.

    Input [batch, inputs], output [batch, classes].
    """
    blocks: list[nn.Module] = []
    for index in range(layers - 1):
        parts: list[nn.Module] = [nn.Linear(inputs if index == 0 else hidden, hidden)]
        if batch_norm:
            parts.append(nn.BatchNorm1d(hidden))
        blocks.append(nn.Sequential(*parts, ACTIVATIONS[activation]()))
    return nn.Sequential(*blocks, nn.Linear(hidden if layers > 1 else inputs, classes))


def check_activation(activation: str) -> None:
    """Refuse an activation function that is not known.

    Raises:
        PlanError: with the nearest name, and all of them.
    """
    if activation not in ACTIVATIONS:
        raise PlanError(nearest(activation, ACTIVATIONS, "activation"))
