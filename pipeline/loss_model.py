"""A DNI that is a small model of the rest of the network: what it predicts is the gradient of a loss.

h --head C--> output' --the user's loss(., labels)--> L        s = dL/dh
                                                               trained on L + beta * |s - g|^2 / sigma^2
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipeline.cut import Cut
from pipeline.dni_forms import Form

__all__ = ["LossModel", "head_for"]

_POOLED = 4
"""An image-shaped activation is pooled to 4 x 4 before a head with a flat output."""


class LossModel(Form):
    """The input gradient of a small loss model: grad_h L(C(h), y), with the user's own L.

    C is a head with one hidden layer whose output has the shape of the network's. It learns to predict (the
    loss term) and to have the true gradient (the matching term, through a second backward, cheap because C is
    small). Any loss that can be differentiated twice, classification or regression; trains on 512 rows of a
    batch at most.

    Differs from Jaderberg et al. 2017: nothing is regressed directly. Related: local losses in greedy
    training (Nøkland and Eidnes 2019), which are this form without the matching term (beta = 0).

    Args:
        cut: where it works.
        hidden: hidden units (channels) of C.
        beta: weight of the matching term.
    """

    most_rows = 512

    def __init__(self, cut: Cut, hidden: int, beta: float) -> None:
        super().__init__()
        self.loss, self.beta = cut.loss, beta
        self.batch_size = cut.activation_shape[0]
        self.head = head_for(cut, hidden)

    def predict(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
    ) -> Float[Tensor, " batch *features"]:
        """The gradient of the loss model at ``h``, in units of ``sigma``."""
        return self._loss_and_gradient(h, labels, differentiable=False)[1] / sigma

    def objective(
        self,
        h: Float[Tensor, " rows *features"],
        labels: Shaped[Tensor, " rows *rest"],
        target: Float[Tensor, " rows *features"],
        sigma: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """The loss of the head plus ``beta`` times the squared error of its gradient."""
        loss, gradient = self._loss_and_gradient(h, labels, differentiable=self.beta > 0)
        if self.beta > 0:
            loss = loss + self.beta * F.mse_loss(gradient / sigma, target)
        return loss

    def _loss_and_gradient(self, h: Tensor, labels: Tensor, *, differentiable: bool) -> tuple[Tensor, Tensor]:
        leaf = h.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(self.head(leaf), labels)
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=differentiable)
        if not differentiable:
            gradient = gradient.detach()
        # A mean over fewer rows weighs each row more; undone here, so a row gives what it gives in a batch.
        return loss, gradient * (len(h) / self.batch_size)


def head_for(cut: Cut, hidden: int) -> nn.Module:
    """C: position by position where the output has the positions of h, else from whole samples."""
    shape, output = cut.activation_shape, cut.output_shape
    if len(shape) == len(output) == 4:
        return _ImageHead(shape[1], hidden, output)
    if len(shape) > 1 and shape[:-1] == output[:-1]:
        return nn.Sequential(nn.Linear(shape[-1], hidden), nn.ReLU(), nn.Linear(hidden, output[-1]))
    return _SampleHead(shape, hidden, output)


class _SampleHead(nn.Module):
    """All features of a sample in, an output of any shape out."""

    def __init__(self, shape: tuple[int, ...], hidden: int, output: tuple[int, ...]) -> None:
        super().__init__()
        image = len(shape) == 4 and min(shape[2:]) > _POOLED
        features = shape[1] * _POOLED**2 if image else torch.Size(shape[1:]).numel()
        self.pool = nn.AdaptiveAvgPool2d(_POOLED) if image else nn.Identity()
        self.body = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, torch.Size(output[1:]).numel())
        )
        self.output = output[1:]

    def forward(self, h: Float[Tensor, " batch *features"]) -> Float[Tensor, " batch *output"]:
        output: Tensor = self.body(self.pool(h).flatten(1))
        return output.reshape(len(h), *self.output)


class _ImageHead(nn.Module):
    """Image in, image out: 3x3 and 1x1 convolution, resized to the network's output."""

    def __init__(self, channels: int, hidden: int, output: tuple[int, ...]) -> None:
        super().__init__()
        first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.body = nn.Sequential(first, nn.ReLU(), nn.Conv2d(hidden, output[1], 1))
        self.size = output[2:]

    def forward(self, h: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out rows columns"]:
        return F.interpolate(self.body(h), size=self.size)
