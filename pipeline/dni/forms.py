"""The forms of a DNI that need nothing but (h, y): direct regressors, and the residual of a local classifier.

    linear, mlp, conv    (h, y) --regressor--> s                  last layer zero
    label_residual       a A (softmax(C h) - onehot(y))           A zero
    a user's own module  (h, y) --module--> s

Every form predicts in units of sigma, the running root mean square of the true gradient; ``DNI`` (dni.py)
converts. A form that starts at zero asks for no update at first: no update is better than a random one.

What a form learns from (h, y) alone it learns at once, when it meets the batch; what it learns from the true gradient,
when that comes back. Late news about h is what makes a DNI fail under delay, so nothing waits that need not.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipeline.model.cut import Cut

__all__ = ["HIDDEN", "MLP", "Conv", "Custom", "Form", "LabelResidual", "Linear", "clip", "root_mean_square"]

HIDDEN = 128
"""Hidden units where the plan names no number."""

_Layer = TypeVar("_Layer", bound=nn.Module)
_LEAST_SCALE = 1e-3  # where A points away from the last targets: hardly anything, but a DNI that says nothing is dead
_REMEMBERED = 0.95  # of the products that give a scale: it suits the last 20 targets or so


class Form(nn.Module):
    """What every form can do: predict, and say what it is trained on.

    Attributes:
        most_rows: rows of a batch it trains on at most, where all would cost too much; None: all.
        every: of how many batches one gives a target, unless the plan says otherwise.
    """

    most_rows: int | None = None
    every: int = 1

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that learn from (h, y) alone, at once."""
        return []

    def taught_parameters(self) -> list[nn.Parameter]:
        """Those that learn from targets: all others that are trained at all."""
        own = {id(parameter) for parameter in self.own_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in own]

    def predict(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
    ) -> Float[Tensor, " batch *features"]:
        """The gradient at ``h``, in units of ``sigma``; in memory that nobody else has."""
        prediction: Tensor = self(h, labels)
        return prediction

    def clipped(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, " batch *features"], Float[Tensor, ""]]:
        """The prediction with its root mean square clipped to 1, times ``sigma``; and its root mean square before."""
        return clip(self.predict(h, labels, sigma), sigma)

    def meet(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
        samples: slice,
    ) -> tuple[Float[Tensor, " batch *features"], Float[Tensor, ""]]:
        """As ``clipped``; sets the ``.grad`` of every parameter in ``own_parameters`` on the way.

        Args:
            h: activation of a batch that the stage has just computed.
            labels: its labels.
            sigma: as in ``clipped``.
            samples: those to train on.
        """
        return self.clipped(h, labels, sigma)

    def objective(
        self,
        h: Float[Tensor, " rows *features"],
        labels: Shaped[Tensor, " rows *rest"],
        target: Float[Tensor, " rows *features"],
        sigma: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """The loss to train on.

        Args:
            h: activations of the chosen samples, detached.
            labels: their labels.
            target: their true gradient, in units of ``sigma``.
            sigma: running root mean square of the true gradient.
        """
        return F.mse_loss(self.predict(h, labels, sigma), target)

    def gradients(
        self,
        h: Float[Tensor, " rows *features"],
        labels: Shaped[Tensor, " rows *rest"],
        target: Float[Tensor, " rows *features"],
        sigma: Float[Tensor, ""],
    ) -> None:
        """Set the ``.grad`` of every parameter that learns from targets to the gradient of the objective."""
        trained = self.taught_parameters()
        with torch.enable_grad():
            loss = self.objective(h, labels, target, sigma)
        if trained:
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient


class _Regressor(Form):
    """A body on rows of (h, code of the labels)."""

    body: nn.Module

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.features = cut.features
        self.code = _LabelCode(cut)

    def forward(
        self, h: Float[Tensor, " batch *features"], labels: Shaped[Tensor, " batch *rest"]
    ) -> Float[Tensor, " batch *features"]:
        """The prediction, shaped like ``h``."""
        rows = h.reshape(-1, self.features)
        prediction: Tensor = self.body(torch.cat((rows, self.code(labels, len(rows), h.dtype)), dim=1))
        return prediction.reshape(h.shape)


class Linear(_Regressor):
    """A linear map of (h, onehot(y)): the label-conditioned cDNI of Jaderberg et al. 2017.

    Args:
        cut: where it works.
    """

    def __init__(self, cut: Cut) -> None:
        super().__init__(cut)
        self.body = _zero(nn.Linear(cut.features + self.code.size, cut.features))


class MLP(_Regressor):
    """One hidden ReLU layer between (h, onehot(y)) and the gradient (Jaderberg et al. 2017, cDNI).

    Differs from the paper: no batch normalisation, so that a prediction depends on its own row alone.

    Args:
        cut: where it works.
        hidden: hidden units.
    """

    def __init__(self, cut: Cut, hidden: int) -> None:
        super().__init__(cut)
        first = nn.Linear(cut.features + self.code.size, hidden)
        self.body = nn.Sequential(first, nn.ReLU(), _zero(nn.Linear(hidden, cut.features)))


class Conv(Form):
    """Two 3x3 convolutions over an image-shaped h, labels as constant planes (Jaderberg et al. 2017, cDNI).

    Differs from the paper: the planes join after the first convolution, where they are one bias per sample
    and channel.

    Args:
        cut: where it works; its activation is [batch, channels, height, width].
        hidden: channels between the convolutions.
    """

    def __init__(self, cut: Cut, hidden: int) -> None:
        super().__init__()
        channels = cut.activation.shape[1]
        self.code = _LabelCode(cut)
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.planes = nn.Linear(self.code.size, hidden, bias=False)
        self.last = _zero(nn.Conv2d(hidden, channels, 3, padding=1))

    def forward(
        self, h: Float[Tensor, "batch channels height width"], labels: Shaped[Tensor, " batch *rest"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The prediction, shaped like ``h``."""
        planes = self.planes(self.code(labels, len(h), h.dtype))[:, :, None, None]
        prediction: Tensor = self.last(torch.relu(self.first(h) + planes))
        return prediction


class Custom(Form):
    """A user's own module, trained by squared error.

    Args:
        module: (h, labels) -> prediction shaped like h, in units of the running RMS of the true gradient.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, h: Float[Tensor, " batch *features"], labels: Shaped[Tensor, " batch *rest"]
    ) -> Float[Tensor, " batch *features"]:
        """The prediction.

        Raises:
            ValueError: the module's prediction is not shaped like ``h``.
        """
        prediction: Tensor = self.module(h, labels)
        if prediction.shape != h.shape:
            raise ValueError(
                f"{type(self.module).__name__}, from the DNI factory, gave {list(prediction.shape)} for "
                f"an activation {list(h.shape)}: it must return a prediction shaped like the activation."
            )
        return prediction

    def predict(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
    ) -> Float[Tensor, " batch *features"]:
        """A copy of it: the module may give ``h`` itself or a parameter, and predictions are clipped in place."""
        return super().predict(h, labels, sigma).clone()


class LabelResidual(Form):
    """a A (softmax(C h) - onehot(y)): what a local classifier gets wrong, mapped back to h.

    C learns from the labels, at once, by its own cross-entropy; A (starts at zero) by squared error to the true
    gradient when that comes back, and the number a is the least squares scale of A over the last targets: Adam moves A
    by small even steps, and for hundreds of targets A is right in direction and far too short. Costs thin products
    only; either learns from 128 rows of a batch at most, A from every fourth target.

    Not in Jaderberg et al. 2017. Exact where a linear top under cross-entropy follows: A is then its weights. A form
    whose C waited for the true gradient as well failed when that came late: with four stages and a hop of 8 steps it
    ended at 40 % error on digits, where this one makes 2 %.

    Args:
        cut: where it works; the labels are one class per row.
    """

    most_rows = 128
    every = 4
    products: Tensor
    scale: Tensor

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        assert cut.classes is not None, "describe_form lets label_residual pass with class labels only"
        self.features = cut.features
        self.local = nn.Linear(cut.features, cut.classes)  # C
        self.back = nn.Parameter(torch.zeros(cut.classes, cut.features))  # A transposed: faster products
        self.register_buffer("products", torch.zeros(2))  # <target, R A> and <R A, R A>, running sums
        self.register_buffer("scale", torch.ones(()))  # a

    def own_parameters(self) -> list[nn.Parameter]:
        """Those of C."""
        return list(self.local.parameters())

    def forward(
        self, h: Float[Tensor, " batch *features"], labels: Shaped[Tensor, " batch *rest"]
    ) -> Float[Tensor, " batch *features"]:
        """The prediction, shaped like ``h``."""
        return ((self._residual(h, labels) * self.scale) @ self.back).reshape(h.shape)

    @torch.no_grad()
    def meet(
        self,
        h: Float[Tensor, " batch *features"],
        labels: Shaped[Tensor, " batch *rest"],
        sigma: Float[Tensor, ""],
        samples: slice,
    ) -> tuple[Float[Tensor, " batch *features"], Float[Tensor, ""]]:
        """As ``clipped``, and the gradient of the cross-entropy of C, which takes the same residuals."""
        residual = self._residual(h, labels)
        rows = h[samples].reshape(-1, self.features)
        wrong = residual.view(len(h), -1, residual.shape[1])[samples].flatten(0, 1) / len(rows)
        self.local.weight.grad, self.local.bias.grad = wrong.T @ rows, wrong.sum(dim=0)
        return clip((residual.mul_(self.scale) @ self.back).reshape(h.shape), sigma)

    @torch.no_grad()
    def gradients(
        self,
        h: Float[Tensor, " rows *features"],
        labels: Shaped[Tensor, " rows *rest"],
        target: Float[Tensor, " rows *features"],
        sigma: Float[Tensor, ""],
    ) -> None:
        """Squared error of A, in closed form (a test compares it with autograd); and the scale that suits A so far.

        With R the residuals and T the target, neither R A nor the error R A - T is formed where there are fewer classes
        than rows: R^T (R A - T) = (R^T R) A - R^T T, <T, R A> = <R^T T, A> and <R A, R A> = <(R^T R) A, A>.
        """
        residual, target = self._residual(h, labels), target.reshape(-1, self.features)
        slope = 2 / target.numel()
        if residual.shape[1] < len(residual):
            wanted, there = residual.T @ target, (residual.T @ residual) @ self.back
            products = [_dot(wanted, self.back), _dot(there, self.back)]
            self.back.grad = (there - wanted).mul_(slope)
        else:
            there = residual @ self.back
            products = [_dot(target, there), _dot(there, there)]
            self.back.grad = slope * residual.T @ (there - target)
        self.products.mul_(_REMEMBERED).add_(torch.stack(products))
        fits, size = self.products
        self.scale.copy_(torch.where(size > 0, fits / size, 1.0).clamp(min=_LEAST_SCALE))

    def _residual(self, h: Tensor, labels: Tensor) -> Float[Tensor, "rows classes"]:
        """softmax(C h) - onehot(y); zeros where the label is negative, by convention one that the loss ignores."""
        rows, labels = h.reshape(-1, self.features), labels.reshape(-1, 1)
        residual: Tensor = self.local(rows).softmax(dim=-1)
        residual.scatter_add_(1, labels.clamp(min=0).long(), residual.new_full((len(rows), 1), -1))
        return residual.mul_(labels >= 0)


def clip(
    prediction: Float[Tensor, " batch *features"], sigma: Float[Tensor, ""], factor: Float[Tensor, ""] | None = None
) -> tuple[Float[Tensor, " batch *features"], Float[Tensor, ""]]:
    """A prediction in units of ``sigma`` with its root mean square clipped to 1, times ``sigma``; and what that was.

    In place: fresh memory would cost as much as the product that the prediction came from.

    Args:
        prediction: before the clip.
        sigma: what it is in units of.
        factor: to multiply the prediction with, before the clip and in the same pass; None: 1.
    """
    size = root_mean_square(prediction)
    if factor is not None:
        size, sigma = size * factor, sigma * factor
    return prediction.mul_(sigma / size.clamp(min=1)), size


def root_mean_square(values: Tensor) -> Float[Tensor, ""]:
    """sqrt of the mean of the squares; 0 where there are no values."""
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm / math.sqrt(max(1, values.numel()))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


def one_hot(labels: Shaped[Tensor, " *rest"], classes: int, dtype: torch.dtype) -> Float[Tensor, "*rest classes"]:
    """One-hot rows; a negative label, by convention one that the loss ignores, gives a row of zeros."""
    return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).to(dtype)


class _LabelCode(nn.Module):
    """Labels as numbers in a row: class indices one-hot, anything else as it is, flattened; unconditioned: one zero."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.classes, self.conditioned = cut.classes, cut.conditioned
        num_labels = 1 if cut.per_token else torch.Size(cut.labels.shape[1:]).numel()
        self.size = num_labels * (cut.classes or 1) if cut.conditioned else 1

    def forward(
        self, labels: Shaped[Tensor, " batch *rest"], rows: int, dtype: torch.dtype
    ) -> Float[Tensor, "rows size"]:
        if not self.conditioned:
            return torch.zeros(rows, 1, dtype=dtype, device=labels.device)
        if self.classes is None:
            return labels.reshape(rows, self.size).to(dtype)
        return one_hot(labels, self.classes, dtype).reshape(rows, self.size)


def _zero(layer: _Layer) -> _Layer:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
