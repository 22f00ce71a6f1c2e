"""A DNI that is a small model of the rest of the network: the gradient of its loss, as large as the true one.

h --head C--> output' --the user's loss(., labels)--> L         s = a m,  m = dL/dh
                                                                C learns from L at once, a from the size of g
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipeline.cut import Cut
from pipeline.dni_forms import HIDDEN, Form, clip

__all__ = ["LossModel", "head_for"]

_POOLED = 4
"""An image-shaped activation is pooled to 4 x 4 before a head with a flat output."""
_FEW = 4
"""A normalisation takes two of the features' degrees of freedom; of so few it would take most."""
_REMEMBERED = 0.95  # of the squares that give a: it suits the last 20 targets or so


class LossModel(Form):
    """a grad_h L(C(h), y): the input gradient of a small loss model, in the size of the true gradient.

    C is a head whose output has the shape of the network's, L the user's own loss. C learns to predict, at once. The
    true gradient, of every fourth batch, says how large the prediction is and nothing else: what more was learned from
    it (a least squares factor, a map of what C gets wrong, C itself) brought the prediction nearer to the true gradient
    and training no further (docs/decisions.md). Any loss, classification or regression.

    Differs from Jaderberg et al. 2017: nothing is regressed from h. Related: local losses in greedy training (Nøkland
    and Eidnes 2019), which are this form without its size.

    Args:
        cut: where it works.
        hidden: hidden units (channels) of C; None: as ``head_for`` says.
    """

    most_rows = 128
    every = 4
    squares: Tensor
    size: Tensor

    def __init__(self, cut: Cut, hidden: int | None) -> None:
        super().__init__()
        self.loss = cut.loss
        self.batch_size = cut.activation_shape[0]
        self.head = head_for(cut, hidden)
        self.register_buffer("squares", torch.zeros(2))  # |g|^2 and |m|^2, running sums
        self.register_buffer("size", torch.ones(()))  # a

    def own_parameters(self) -> list[nn.Parameter]:
        """Those of C: all there are."""
        return list(self.head.parameters())

    def predict(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
    ) -> Float[Tensor, " batch *features"]:
        """The prediction, in units of ``sigma``."""
        (of_model,) = self._differentiated(h, labels, [])
        return of_model.mul_(self.size / sigma)

    def meet(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
        samples: slice,
    ) -> tuple[Float[Tensor, " batch *features"], Float[Tensor, ""]]:
        """As ``clipped``; the same backward pass gives the gradient of C, from all samples."""
        own = self.own_parameters()
        of_model, *of_head = self._differentiated(h, labels, own)
        for parameter, gradient in zip(own, of_head, strict=True):
            parameter.grad = gradient
        return clip(of_model.mul_(self.size / sigma), sigma)

    @torch.no_grad()
    def gradients(
        self,
        h: Float[Tensor, " rows *features"],
        labels: Shaped[Tensor, " rows *rest"],
        target: Float[Tensor, " rows *features"],
        sigma: Float[Tensor, ""],
    ) -> None:
        """No gradients: of a target its size alone is learned. a^2 = sum |g|^2 / sum |m|^2, over the last 20 or so."""
        (of_model,) = self._differentiated(h, labels, [])
        norms = torch.linalg.vector_norm(target) * sigma, torch.linalg.vector_norm(of_model)
        self.squares.mul_(_REMEMBERED).add_(torch.stack(norms).square())
        true, of_models = self.squares
        self.size.copy_(torch.where(of_models > 0, (true / of_models).sqrt(), self.size))

    def _differentiated(self, h: Tensor, labels: Tensor, more: list[nn.Parameter]) -> list[Tensor]:
        """dL/dh, and dL of each of ``more``.

        A mean over fewer samples weighs each more. Undone here, so a sample gives what it gives in a whole batch.
        """
        leaf = h.detach().requires_grad_()
        with torch.enable_grad():
            of_model, *others = torch.autograd.grad(self.loss(self.head(leaf), labels), [leaf, *more])
        return [of_model * (len(h) / self.batch_size), *others]


def head_for(cut: Cut, hidden: int | None) -> nn.Module:
    """C: position by position where the output has the positions of h, else from whole samples or from image to image.

    It is what a transformer reads its own output with, a normalisation and a linear layer, and has a hidden layer
    between them only where ``hidden`` is given (from image to image always: 128 channels unless said). The loss is then
    blind to how large h is, so that a stage gains nothing from making it larger.
    """
    shape, output = cut.activation_shape, cut.output_shape
    if len(shape) == len(output) == 4:
        return _ImageHead(shape[1], hidden or HIDDEN, output)
    if len(shape) > 1 and shape[:-1] == output[:-1]:
        return _reader(shape[-1], hidden, output[-1])
    return _SampleHead(shape, hidden, output)


def _reader(features: int, hidden: int | None, outputs: int) -> nn.Sequential:
    """So few features that a normalisation would leave nothing of them are read as they are."""
    normalised = nn.LayerNorm(features) if features > _FEW else nn.Identity()
    if hidden is None:
        return nn.Sequential(normalised, nn.Linear(features, outputs))
    return nn.Sequential(normalised, nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class _SampleHead(nn.Module):
    """All features of a sample in, an output of any shape out."""

    def __init__(self, shape: tuple[int, ...], hidden: int | None, output: tuple[int, ...]) -> None:
        super().__init__()
        image = len(shape) == 4 and min(shape[2:]) > _POOLED
        features = shape[1] * _POOLED**2 if image else torch.Size(shape[1:]).numel()
        self.pool = nn.AdaptiveAvgPool2d(_POOLED) if image else nn.Identity()
        self.body = _reader(features, hidden, torch.Size(output[1:]).numel())
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
