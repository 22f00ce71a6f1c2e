"""The heads of a loss model: from an activation to an output with the shape of the network's, and back.

h --[pool]--> --[normalise]--> --[hidden, ReLU]--> linear --> output         what is in brackets, not everywhere
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.dni.forms import HIDDEN
from pipeline.model.cut import Cut

__all__ = ["Head", "Slope", "head_for"]

Slope = Callable[[Tensor], Tensor]
"""Output of a head -> gradient of some function there."""

_POOLED = 4  # an image-shaped activation is pooled to 4 x 4 before a head with a flat output
_FEW = 4  # a normalisation takes two of the features' degrees of freedom; of so few it would take most


def head_for(cut: Cut, hidden: int | None) -> Head:
    """Position by position where the output has the positions of h, else from whole samples or from image to image.

    A normalisation and a linear layer, as a transformer reads its own output, with a hidden layer only where ``hidden``
    is given (from image to image always: 128 channels unless said). The loss is then blind to how large h is, so that a
    stage gains nothing from making it larger. There is no normalisation where the stage ends in one and nothing is
    pooled behind it: it would hide from the head what the layers above see.
    """
    shape, output = cut.activation.shape, cut.output.shape
    if len(shape) == len(output) == 4:
        return _ImageHead(shape[1], hidden or HIDDEN, output)
    by_position = len(shape) > 1 and shape[:-1] == output[:-1]
    leading = len(shape) - 1 if by_position else 1
    pools = not by_position and len(shape) == 4 and min(shape[2:]) > _POOLED
    features = shape[1] * _POOLED**2 if pools else torch.Size(shape[leading:]).numel()
    normalises = features > _FEW and (pools or not cut.normalised)
    kind = _LinearHead if hidden is None and not pools else _FlatHead
    return kind(features, hidden, leading, output, pools=pools, normalises=normalises)


class Head(nn.Module):
    """h in, an output out, and the gradient back."""

    def differentiated(self, h: Tensor, slope: Slope, learned: Slope | None = None) -> Tensor:
        """The gradient at ``h`` [batch, *features] of a function of the output; in memory that nobody else has.

        Args:
            slope: output, detached -> gradient of the function there.
            learned: the same of what the head learns to make small, often ``slope`` itself; sets the ``.grad`` of every
                parameter.
        """
        leaf, own = h.detach().requires_grad_(), list(self.parameters()) if learned is not None else []
        with torch.enable_grad():
            output = self(leaf)
        if learned is None or learned is slope:
            at_h, *of_own = torch.autograd.grad(output, [leaf, *own], slope(output.detach()))
        else:
            (at_h,) = torch.autograd.grad(output, [leaf], slope(output.detach()), retain_graph=True)
            of_own = list(torch.autograd.grad(output, own, learned(output.detach())))
        for parameter, gradient in zip(own, of_own, strict=True):
            parameter.grad = gradient
        return at_h


class _FlatHead(Head):
    """From rows of features; the first ``leading`` dimensions of h and of the output count the rows."""

    body: nn.Module

    def __init__(
        self, features: int, hidden: int | None, leading: int, output: tuple[int, ...], *, pools: bool, normalises: bool
    ) -> None:
        super().__init__()
        self.leading, self.output = leading, output[leading:]
        num_outputs = torch.Size(self.output).numel()
        self.pool = nn.AdaptiveAvgPool2d(_POOLED) if pools else nn.Identity()
        self.norm = nn.LayerNorm(features) if normalises else nn.Identity()
        if hidden is None:
            self.body = nn.Linear(features, num_outputs)
        else:
            self.body = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, num_outputs))

    def forward(self, h: Float[Tensor, " batch *features"]) -> Float[Tensor, " batch *output"]:
        return self._outputs(h, self.body(self.norm(self.pool(h).flatten(self.leading))))

    def _outputs(self, h: Tensor, rows: Tensor) -> Tensor:
        return rows.reshape(*h.shape[: self.leading], *self.output)


class _LinearHead(_FlatHead):
    """Without pooling and hidden layer. Differentiated by hand: entering and leaving autograd takes longer."""

    body: nn.Linear

    def forward(self, h: Float[Tensor, " batch *features"]) -> Float[Tensor, " batch *output"]:
        return self._outputs(h, self.body(self.norm(self._rows(h))))

    @torch.no_grad()
    def differentiated(self, h: Tensor, slope: Slope, learned: Slope | None = None) -> Tensor:
        rows, linear, norm = self._rows(h), self.body, self.norm
        read, *moments = _normalised(rows, norm) if isinstance(norm, nn.LayerNorm) else (rows,)
        output = self._outputs(h, linear(read))
        at_outputs = slope(output).reshape(len(rows), -1)
        at_read = at_outputs @ linear.weight
        to_learn = at_outputs
        if learned is not None:
            to_learn = at_outputs if learned is slope else learned(output).reshape(len(rows), -1)
            linear.weight.grad, linear.bias.grad = to_learn.T @ read, to_learn.sum(dim=0)
        if not isinstance(norm, nn.LayerNorm):
            return at_read.view(h.shape)
        together = learned is slope
        at_rows, *of_norm = _back(at_read, rows, moments, norm, wanted=(True, together, together))
        if learned is not None:
            if not together:
                _, *of_norm = _back(to_learn @ linear.weight, rows, moments, norm, wanted=(False, True, True))
            norm.weight.grad, norm.bias.grad = of_norm
        return at_rows.view(h.shape)

    def _rows(self, h: Tensor) -> Float[Tensor, "rows features"]:
        return h.reshape(-1, self.body.in_features)


def _normalised(rows: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The rows as ``norm`` gives them, their means, and one over their standard deviations."""
    return torch.native_layer_norm(rows, list(norm.normalized_shape), norm.weight, norm.bias, norm.eps)


def _back(
    gradient: Tensor, rows: Tensor, moments: list[Tensor], norm: nn.LayerNorm, *, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient behind ``norm`` to those of the rows, the weight and the bias, as far as they are wanted."""
    given = (gradient, rows, list(norm.normalized_shape), *moments, norm.weight, norm.bias, list(wanted))
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(*given)
    return found


class _ImageHead(Head):
    """Image in, image out: 3x3 and 1x1 convolution, resized to the network's output."""

    def __init__(self, channels: int, hidden: int, output: tuple[int, ...]) -> None:
        super().__init__()
        first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.body = nn.Sequential(first, nn.ReLU(), nn.Conv2d(hidden, output[1], 1))
        self.size = output[2:]

    def forward(self, h: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out rows columns"]:
        return F.interpolate(self.body(h), size=self.size)
