"""The forms that regress the gradient from (h, y): the cDNI of Jaderberg et al. 2017, and a user's own module.

The last layer of ours starts at zero.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.dni.forms import HIDDEN, Activation, Form, Labels
from pipeline.model.cut import Cut
from pipeline.plan.plan import DNIPlan

__all__ = ["MLP", "Conv", "Custom", "Linear"]

_Layer = TypeVar("_Layer", bound=nn.Module)


class _Regressor(Form):
    """A body on rows of (h, code of the labels)."""

    body: nn.Module

    def __init__(self, cut: Cut, plan: DNIPlan) -> None:
        super().__init__()
        self.features = cut.features
        self.code = _LabelCode(cut)

    def forward(self, h: Activation, labels: Labels) -> Activation:
        rows = h.reshape(-1, self.features)
        prediction: Tensor = self.body(torch.cat((rows, self.code(labels, len(rows), h.dtype)), dim=1))
        return prediction.reshape(h.shape)


class Linear(_Regressor):
    """A linear map of (h, onehot(y)): the label-conditioned cDNI of Jaderberg et al. 2017."""

    name = "linear"
    reads = ("labels",)

    def __init__(self, cut: Cut, plan: DNIPlan) -> None:
        super().__init__(cut, plan)
        self.body = _zero(nn.Linear(cut.features + self.code.size, cut.features))


class MLP(_Regressor):
    """One hidden ReLU layer between (h, onehot(y)) and the gradient (Jaderberg et al. 2017, cDNI).

    Differs from the paper: no batch normalisation, so that a prediction depends on its own row alone.
    """

    name = "mlp"
    reads = ("hidden", "labels")

    def __init__(self, cut: Cut, plan: DNIPlan) -> None:
        super().__init__(cut, plan)
        hidden = plan.hidden or HIDDEN
        first = nn.Linear(cut.features + self.code.size, hidden)
        self.body = nn.Sequential(first, nn.ReLU(), _zero(nn.Linear(hidden, cut.features)))


class Conv(Form):
    """Two 3x3 convolutions over an image-shaped h, labels as constant planes (Jaderberg et al. 2017, cDNI).

    Differs from the paper: the planes join after the first convolution, where they are one bias per sample and channel.
    """

    name = "conv"
    reads = ("hidden", "labels")

    def __init__(self, cut: Cut, plan: DNIPlan) -> None:
        super().__init__()
        channels, hidden = cut.activation.shape[1], plan.hidden or HIDDEN
        self.code = _LabelCode(cut)
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.planes = nn.Linear(self.code.size, hidden, bias=False)
        self.last = _zero(nn.Conv2d(hidden, channels, 3, padding=1))

    @classmethod
    def misfit(cls, cut: Cut) -> str | None:
        labels, shape = cut.labels, list(cut.activation.shape)
        if len(shape) != 4:
            return f"the activation is {shape}, not [batch, channels, height, width]; choose loss_model or mlp."
        if cut.classes is not None and len(labels.shape) > 1:
            return f"labels {labels} are not one class per sample; choose loss_model."
        return None

    def forward(self, h: Float[Tensor, "batch channels height width"], labels: Labels) -> Tensor:
        planes = self.planes(self.code(labels, len(h), h.dtype))[:, :, None, None]
        prediction: Tensor = self.last(torch.relu(self.first(h) + planes))
        return prediction


class Custom(Form):
    """A user's own module, trained by squared error: (h, labels) -> prediction shaped like h."""

    name = "factory"

    def __init__(self, cut: Cut, plan: DNIPlan) -> None:
        super().__init__()
        assert plan.factory is not None, "this form is chosen by giving a factory"
        self.module = plan.factory(cut)

    def forward(self, h: Activation, labels: Labels) -> Activation:
        prediction: Tensor = self.module(h, labels)
        if prediction.shape != h.shape:
            raise ValueError(
                f"{type(self.module).__name__}, from the DNI factory, gave {list(prediction.shape)} for "
                f"an activation {list(h.shape)}: it must return a prediction shaped like the activation."
            )
        return prediction.clone()  # it may be h itself or a parameter, and predictions are clipped in place


class _LabelCode(nn.Module):
    """Labels as numbers in a row: class indices one-hot, anything else as it is, flattened; unconditioned: one zero."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.classes, self.conditioned = cut.classes, cut.conditioned
        num_labels = 1 if cut.per_token else torch.Size(cut.labels.shape[1:]).numel()
        self.size = num_labels * (cut.classes or 1) if cut.conditioned else 1

    def forward(self, labels: Labels, rows: int, dtype: torch.dtype) -> Float[Tensor, "rows size"]:
        if not self.conditioned:
            return torch.zeros(rows, 1, dtype=dtype, device=labels.device)
        if self.classes is not None:  # a negative label, by convention one that the loss ignores, gives zeros
            labels = labels.unsqueeze(-1) == torch.arange(self.classes, device=labels.device)
        return labels.reshape(rows, self.size).to(dtype)


def _zero(layer: _Layer) -> _Layer:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
