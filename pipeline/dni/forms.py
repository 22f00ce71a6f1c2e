"""What every form of a DNI can do and says of itself: what it is called, where it fits, what it reads of the plan.

What a form learns from (h, y) alone it learns at once, when it meets the batch; what it learns from the true gradient,
when that comes back. Late news about h is what makes a DNI fail under delay, so nothing waits that need not. A form
that starts at zero asks for no update at first: better than a random one.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipeline.model.cut import Cut

__all__ = ["HIDDEN", "Activation", "Form", "Labels", "Scalar", "clip", "root_mean_square"]

HIDDEN = 128
"""Hidden units where the plan names no number."""

Activation = Float[Tensor, " batch *features"]
"""h, or a gradient at h, of a whole batch or of some of its samples."""
Labels = Shaped[Tensor, " batch *rest"]
Scalar = Float[Tensor, ""]


class Form(nn.Module):
    """A module (h, labels) -> the gradient at h, in units of sigma and in memory that nobody else has.

    Sigma is the running root mean square of the true gradient. Those a plan can name are built from (cut, plan).
    """

    name: ClassVar[str]  # what a plan calls it
    reads: ClassVar[tuple[str, ...]] = ()  # which of the options hidden, labels and temperature
    most_rows: ClassVar[int | None] = None  # of a batch it trains on at most, where all would cost too much; None: all
    every: ClassVar[int] = 1  # of how many batches one gives a target, unless the plan says otherwise

    @classmethod
    def misfit(cls, cut: Cut) -> str | None:
        """Why it cannot work at this cut, with the remedy; None where it can."""
        return None

    @classmethod
    def most_rows_at(cls, cut: Cut) -> int | None:
        """``most_rows``, but for what the loss of the cut demands."""
        return cls.most_rows

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that learn from (h, y) alone, at once."""
        return []

    def taught_parameters(self) -> list[nn.Parameter]:
        """Those that learn from targets: all others that are trained at all."""
        own = {id(parameter) for parameter in self.own_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in own]

    def clipped(self, h: Activation, labels: Labels, sigma: Scalar) -> tuple[Activation, Scalar]:
        """The prediction with its root mean square clipped to 1, times ``sigma``; and what that was."""
        return clip(self(h, labels), sigma)

    def meet(self, h: Activation, labels: Labels, sigma: Scalar, samples: slice) -> tuple[Activation, Scalar]:
        """As ``clipped``, of a batch just computed; sets the ``.grad`` of ``own_parameters`` from these samples."""
        return self.clipped(h, labels, sigma)

    def gradients(self, h: Activation, labels: Labels, target: Activation, sigma: Scalar) -> None:
        """Set the ``.grad`` of ``taught_parameters`` to that of the squared error; the target is in units of sigma."""
        trained = self.taught_parameters()
        with torch.enable_grad():
            loss = F.mse_loss(self(h, labels), target)
        if trained:
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient


def clip(prediction: Activation, sigma: Scalar, factor: Scalar | None = None) -> tuple[Activation, Scalar]:
    """A prediction in units of ``sigma`` with its root mean square clipped to 1, times ``sigma``; and what that was.

    In place: fresh memory would cost as much as the product that it came from. ``factor`` is applied before the clip.
    """
    size = root_mean_square(prediction)
    if factor is not None:
        size, sigma = size * factor, sigma * factor
    return prediction.mul_(sigma / size.clamp(min=1)), size


def root_mean_square(values: Tensor) -> Scalar:
    """sqrt of the mean of the squares; 0 where there are no values."""
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm / math.sqrt(max(1, values.numel()))
