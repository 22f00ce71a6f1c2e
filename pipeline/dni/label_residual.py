"""The form that maps what a local classifier gets wrong back to h:  s = a A (softmax(C h) - onehot(y))."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.dni.forms import Activation, Form, Labels, Scalar, clip
from pipeline.model.cut import Cut
from pipeline.plan.plan import DNIPlan

__all__ = ["LabelResidual"]

_LEAST_SCALE = 1e-3  # where A points away from the last targets: hardly anything, but a DNI that says nothing is dead
_REMEMBERED = 0.95  # of the products that give a scale: it suits the last 20 targets or so


class LabelResidual(Form):
    """a A (softmax(C h) - onehot(y)): what a local classifier gets wrong, mapped back to h.

    C learns from the labels, at once, by its own cross-entropy; A (starts at zero) by squared error to the true
    gradient when that comes back, and the number a is the least squares scale of A over the last targets: Adam moves A
    by small even steps, and for hundreds of targets A is right in direction and far too short. Either learns from 128
    rows of a batch at most, A from every fourth target.

    Not in Jaderberg et al. 2017. Exact where a linear top under cross-entropy follows: A is then its weights. Where C
    waited for the true gradient as well, four stages and a hop of 8 steps ended at 40 % error on digits, here at 2 %.
    """

    name = "label_residual"
    most_rows = 128
    every = 4
    products: Tensor
    scale: Tensor

    def __init__(self, cut: Cut, plan: DNIPlan) -> None:
        super().__init__()
        assert cut.classes is not None, "this form fits class labels only"
        self.features = cut.features
        self.local = nn.Linear(cut.features, cut.classes)  # C
        self.back = nn.Parameter(torch.zeros(cut.classes, cut.features))  # A transposed: faster products
        self.register_buffer("products", torch.zeros(2))  # <target, R A> and <R A, R A>, running sums
        self.register_buffer("scale", torch.ones(()))  # a

    @classmethod
    def misfit(cls, cut: Cut) -> str | None:
        labels, shape = cut.labels, list(cut.activation.shape)
        if len(cut.context) > 1:
            return "it reads one tensor of labels, and the loss takes several; choose loss_model."
        if cut.classes is None:
            return f"labels {labels} are no classes of an output {list(cut.output.shape)}; choose loss_model."
        if len(labels.shape) > 1 and not cut.per_token:
            return f"labels {labels} are not one class per row of the activation {shape}; choose loss_model."
        return None

    def own_parameters(self) -> list[nn.Parameter]:
        return list(self.local.parameters())

    def forward(self, h: Activation, labels: Labels) -> Activation:
        return ((self._residual(h, labels) * self.scale) @ self.back).reshape(h.shape)

    @torch.no_grad()
    def meet(self, h: Activation, labels: Labels, sigma: Scalar, samples: slice) -> tuple[Activation, Scalar]:
        """As ``clipped``, and the gradient of the cross-entropy of C, which takes the same residuals."""
        residual = self._residual(h, labels)
        rows = h[samples].reshape(-1, self.features)
        wrong = residual.view(len(h), -1, residual.shape[1])[samples].flatten(0, 1) / len(rows)
        self.local.weight.grad, self.local.bias.grad = wrong.T @ rows, wrong.sum(dim=0)
        return clip((residual.mul_(self.scale) @ self.back).reshape(h.shape), sigma)

    @torch.no_grad()
    def gradients(self, h: Activation, labels: Labels, target: Activation, sigma: Scalar) -> None:
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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())
