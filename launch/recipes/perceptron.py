"""The perceptron that digits, mnist and mlp train."""

from __future__ import annotations

from torch import nn

__all__ = ["perceptron"]


def perceptron(inputs: int, hidden: int, layers: int, classes: int, *, batch_norm: bool = False) -> nn.Sequential:
    """``layers`` layers: each but the last is Linear, (BatchNorm1d,) ReLU; the last is Linear.

    Input [batch, inputs], output [batch, classes].
    """
    blocks: list[nn.Module] = []
    for index in range(layers - 1):
        parts: list[nn.Module] = [nn.Linear(inputs if index == 0 else hidden, hidden)]
        if batch_norm:
            parts.append(nn.BatchNorm1d(hidden))
        blocks.append(nn.Sequential(*parts, nn.ReLU()))
    return nn.Sequential(*blocks, nn.Linear(hidden if layers > 1 else inputs, classes))
