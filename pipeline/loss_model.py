"""A DNI that is a small model of the rest of the network: the gradient of its loss, corrected by the true gradients.

h --head C--> output' --the user's loss(., labels)--> L         s = a dL/dh + sigma * A dL/doutput'
                                                                C learns from L at once, a and A from g
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipeline.cut import Cut
from pipeline.dni_forms import Form, clip

__all__ = ["LossModel", "head_for"]

_POOLED = 4
"""An image-shaped activation is pooled to 4 x 4 before a head with a flat output."""


class LossModel(Form):
    """a grad_h L(C(h), y) + A e: the input gradient of a small loss model, and what the true gradient has besides.

    C is a head with one hidden layer whose output has the shape of the network's, L the user's own loss, e = dL/dC(h)
    what the head gets wrong. C learns to predict, at once. The number a (starts at 1) and the linear map A (starts at
    zero) learn by squared error how much of that is in the true gradient, and what else is, on 512 rows of a batch at
    most. Any loss, classification or regression. From image to image there is no A.

    Differs from Jaderberg et al. 2017: nothing is regressed from h directly. Related: local losses in greedy training
    (Nøkland and Eidnes 2019), which are this form with a = 1, A = 0.

    Args:
        cut: where it works.
        hidden: hidden units (channels) of C.
    """

    most_rows = 512

    def __init__(self, cut: Cut, hidden: int) -> None:
        super().__init__()
        self.loss = cut.loss
        self.batch_size = cut.activation_shape[0]
        self.head = head_for(cut, hidden)
        by_position = cut.activation_shape[:-1] == cut.output_shape[:-1]
        self._row_dims = len(cut.output_shape) - 1 if by_position else 1  # dimensions that number the rows
        self.share = nn.Parameter(torch.ones(()))  # a
        self.back = None
        if not isinstance(self.head, _ImageHead):
            features = torch.Size(cut.activation_shape[self._row_dims :]).numel()
            outputs = torch.Size(cut.output_shape[self._row_dims :]).numel()
            self.back = nn.Parameter(torch.zeros(outputs, features))  # A transposed

    def own_parameters(self) -> list[nn.Parameter]:
        """Those of C."""
        return list(self.head.parameters())

    def predict(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
    ) -> Float[Tensor, " batch *features"]:
        """The prediction, in units of ``sigma``."""
        wrong, of_model = self._differentiated(h, labels, [])
        return self._corrected(wrong, of_model, sigma)

    def meet(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
        samples: slice,
    ) -> tuple[Float[Tensor, " batch *features"], Float[Tensor, ""]]:
        """As ``clipped``; the same backward pass gives the gradient of C, from all samples."""
        own = self.own_parameters()
        wrong, of_model, *of_head = self._differentiated(h, labels, own)
        for parameter, gradient in zip(own, of_head, strict=True):
            parameter.grad = gradient
        return clip(self._corrected(wrong, of_model, sigma), sigma)

    @torch.no_grad()
    def gradients(
        self,
        h: Float[Tensor, " rows *features"],
        labels: Shaped[Tensor, " rows *rest"],
        target: Float[Tensor, " rows *features"],
        sigma: Float[Tensor, ""],
    ) -> None:
        """Squared error of the prediction, from which a and A learn."""
        wrong, of_model = self._differentiated(h, labels, [])
        slope = 2 / target.numel() * (self._corrected(wrong, of_model, sigma) - target)
        self.share.grad = (slope * of_model).sum() / sigma
        if self.back is not None:
            self.back.grad = wrong.T @ slope.reshape(len(wrong), -1)

    def _corrected(self, wrong: Tensor, of_model: Tensor, sigma: Tensor) -> Tensor:
        prediction = of_model * (self.share / sigma)
        if self.back is None:
            return prediction
        return prediction + (wrong @ self.back).reshape(of_model.shape)

    def _differentiated(self, h: Tensor, labels: Tensor, more: list[nn.Parameter]) -> list[Tensor]:
        """dL/dC(h) as rows, times their number; dL/dh; and dL of each of ``more``.

        A mean over fewer samples weighs each more. Undone here, so a sample gives what it gives in a whole batch.
        """
        leaf = h.detach().requires_grad_()
        with torch.enable_grad():
            output = self.head(leaf)
            wrong, of_model, *others = torch.autograd.grad(self.loss(output, labels), [output, leaf, *more])
        wrong = wrong.flatten(0, self._row_dims - 1).flatten(1)
        return [wrong * len(wrong), of_model * (len(h) / self.batch_size), *others]


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
