"""Which samples of a batch the DNI of a cut trains on, and a layer that finds the input gradient of those alone.

The window of a batch is a hash of (seed, cut, batch): both sides of a cut know it, and the stage above computes and
sends the gradient of these samples only.

    batch       | . . . . | window | . . . . |
    x --first layer--> h      all samples
    dL/dx <----------- dL/dh  the window; dL/dW needs all

For a dense stage of n layers, batch B and a window of w that saves 1 - w/B of its 3n matrix products: half of one in
twelve with n = 4 and half the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.seeding import derived_seed

__all__ = ["RowSubsample", "on_rows"]


@dataclass(frozen=True)
class RowSubsample:
    """The samples that count at one cut: ``size`` of ``batch_size``, side by side, as samples come in random order."""

    seed: int
    cut: int
    batch_size: int
    size: int

    @property
    def whole(self) -> bool:
        return self.size >= self.batch_size

    def of(self, batch: int) -> slice:
        """The samples of a batch, given its id."""
        if self.whole:
            return slice(0, self.batch_size)
        windows = math.ceil(self.batch_size / self.size)
        start = derived_seed(self.seed, "dni rows", self.cut, batch) % windows * self.size
        start = min(start, self.batch_size - self.size)
        return slice(start, start + self.size)


def on_rows(module: nn.Module, leaf: Tensor, samples: slice) -> Callable[[Tensor], Tensor] | None:
    """A stage's first layer, but in its backward pass only ``leaf``, ``x[samples]`` of its input x, gets a gradient.

    None where that costs as much as the gradient of all: the layer neither is nor begins with a plain ``nn.Linear``, or
    has hooks.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or torch.is_autocast_enabled("cpu"):
        return None
    if type(module) is nn.Sequential and len(module):
        enter, rest = on_rows(module[0], leaf, samples), module[1:]
        return None if enter is None else lambda x: rest(enter(x))
    if type(module) is nn.Linear:
        return lambda x: _linear_on_window(x, leaf, module.weight, module.bias, samples)
    return None


class _LinearOnWindow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, weight: Tensor, bias: Tensor | None, samples: slice) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.samples = samples
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        _, for_leaf, for_weight, for_bias, _ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        of_leaf = gradient[ctx.samples] @ weight if for_leaf else None
        of_weight = rows.t() @ x.flatten(0, -2) if for_weight else None
        return None, of_leaf, of_weight, rows.sum(0) if for_bias else None, None


_linear_on_window: Callable[..., Tensor] = _LinearOnWindow.apply
