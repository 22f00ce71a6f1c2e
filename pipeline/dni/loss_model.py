"""A DNI that is a small model of the rest of the network: the gradient of its loss, as large as the true one.

h --head C--> output' --the user's loss(., labels)--> L         s = a m,  m = dL/dh, of output' / T for a softer L
                                                                C learns from L at once, a from the size of g
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipeline.dni.forms import Activation, Form, Labels, Scalar, clip
from pipeline.dni.heads import head_for
from pipeline.model.cut import Cut
from pipeline.model.unwritten import Unwritten
from pipeline.plan.plan import DNIPlan

__all__ = ["LossModel", "temperature_for"]

_REMEMBERED = 0.95  # of the squares that give a: it suits the last 20 targets or so
_TEMPERATURE, _DEEP = 2.0, 2  # stages of that many weight matrices learn better from a softened loss
_IGNORED = -100  # the label that torch's cross-entropy leaves out unless told otherwise


class LossModel(Form):
    """a grad_h L(C(h), y): the input gradient of a small loss model, in the size of the true gradient.

    C is a head whose output has the shape of the network's, L the user's own loss, whatever it is. The true gradient,
    of every fourth batch, gives the size of the prediction and nothing else: whatever more was learned from it brought
    training no further (docs/decisions/2026-11-23-loss-model-everywhere.md). Under cross-entropy a prediction is made
    from C(h) / temperature (``temperature_for``), while C learns from L as it is.

    Differs from Jaderberg et al. 2017: nothing is regressed from h. Related: local losses in greedy training (Nøkland
    and Eidnes 2019), which are this form without its size and its temperature.
    """

    name = "loss_model"
    reads = ("hidden", "temperature")
    most_rows = 128
    every = 4
    squares: Tensor
    size: Tensor

    def __init__(self, cut: Cut, plan: DNIPlan) -> None:
        super().__init__()
        self.batch_size = cut.activation.shape[0]
        self.head = head_for(cut, plan.hidden)
        self._slope = _slope_of(cut)
        self._temperature = temperature_for(cut, plan.temperature)
        self.register_buffer("squares", torch.zeros(2))  # |g|^2 and |m|^2, running sums
        self.register_buffer("size", torch.ones(()))  # a, in units of sigma

    @classmethod
    def most_rows_at(cls, cut: Cut) -> int | None:
        return None if cut.whole_batches else cls.most_rows

    def own_parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def forward(self, h: Activation, labels: Labels) -> Activation:
        return self._of_model(h, labels).mul_(self.size)

    def meet(self, h: Activation, labels: Labels, sigma: Scalar, samples: slice) -> tuple[Activation, Scalar]:
        """As ``clipped``; the same backward pass gives the gradient of C, from all samples."""
        return clip(self._of_model(h, labels, learns=True), sigma, self.size)

    @torch.no_grad()
    def gradients(self, h: Activation, labels: Labels, target: Activation, sigma: Scalar) -> None:
        """Of a target its size alone is learned: a^2 = sum |g|^2 / sum |m|^2, over the last 20 or so."""
        norms = torch.linalg.vector_norm(target) * sigma, torch.linalg.vector_norm(self._of_model(h, labels))
        self.squares.mul_(_REMEMBERED).add_(torch.stack(norms).square())
        true, of_models = self.squares
        self.size.copy_(torch.where(of_models > 0, (true / of_models).sqrt() / sigma, self.size))

    def _of_model(self, h: Tensor, labels: Tensor, *, learns: bool = False) -> Tensor:
        """m, and the ``.grad`` of C if it ``learns``.

        A mean over fewer samples weighs each more. Undone here, so a sample gives what it gives in a whole batch.
        """

        def slope(output: Tensor) -> Tensor:
            return self._slope(output, labels)

        asked = slope if self._temperature == 1 else lambda output: slope(output / self._temperature)
        of_model = self.head.differentiated(h, asked, slope if learns else None)
        return of_model if len(h) == self.batch_size else of_model.mul_(len(h) / self.batch_size)


def temperature_for(cut: Cut, temperature: float | None) -> float:
    """What the outputs of C are divided by before a prediction: 1 but for torch's cross-entropy of one class per row.

    There as given; if nothing is, 2 at the uppermost cut, where the stage below it has two weight matrices (or kernels)
    or more, and elsewhere 1 (docs/decisions/2026-11-29-softened-loss.md).
    """
    if _slope_of(cut) is not _cross_entropy_slope:
        return 1.0
    if temperature is not None:
        return temperature
    return _TEMPERATURE if cut.uppermost and cut.depth >= _DEEP else 1.0


def _slope_of(cut: Cut) -> Callable[[Tensor, Tensor], Tensor]:
    """(output, labels) -> dL/d(output), in closed form for the one loss that nearly everybody has, else by autograd."""
    one_class_per_row = cut.classes is not None and len(cut.output.shape) == 2 and cut.labels.dtype == torch.int64
    if one_class_per_row and _is_plain_cross_entropy(cut.loss):
        return _cross_entropy_slope

    loss = Unwritten(cut.loss)

    def slope(output: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            (at_output,) = torch.autograd.grad(loss(output.requires_grad_(), labels), [output])
        return at_output

    return slope


def _is_plain_cross_entropy(loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    if not isinstance(loss, nn.CrossEntropyLoss):
        return loss is F.cross_entropy
    plain = loss.weight is None and loss.label_smoothing == 0 and loss.reduction == "mean"
    return type(loss) is nn.CrossEntropyLoss and plain and loss.ignore_index == _IGNORED


def _cross_entropy_slope(output: Float[Tensor, "rows classes"], labels: Shaped[Tensor, " rows"]) -> Tensor:
    """(softmax(output) - onehot(labels)) / rows; the rows that cross-entropy ignores are zeros and do not count."""
    labels = labels.unsqueeze(1)
    counts = labels != _IGNORED
    wrong = output.softmax(dim=1)
    wrong.scatter_add_(1, labels.clamp(min=0), wrong.new_full(labels.shape, -1))
    return wrong.mul_(counts / counts.sum().clamp(min=1))
