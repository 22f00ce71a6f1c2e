"""A cut: the place between two stages, and everything that is known about it before anything starts.

stage k  --h_k, labels-->  cut k  -->  stage k+1 ... --> output --loss(output, labels)-->
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.messages.bundle import Bundle, Specs, TensorSpec, rows_in
from pipeline.messages.nesting import Nesting

__all__ = ["Cut", "MainOutput"]


@dataclass(frozen=True)
class MainOutput:
    """The one tensor, among those that a network gives, that the loss depends on."""

    layout: Nesting
    place: int

    def loss(self, loss: Callable[[Any, Any], Tensor], others: Bundle = ()) -> Callable[[Tensor, Any], Tensor]:
        """(that tensor, labels) -> loss; what else the network gives is None, or the same rows of ``others``."""
        return partial(_of_main, loss, self, others)


def _of_main(loss: Callable[[Any, Any], Tensor], at: MainOutput, others: Bundle, output: Tensor, labels: Any) -> Tensor:
    tensors = list(rows_in(others, slice(len(output))) if others else (None,) * at.layout.count)
    tensors[at.place] = output
    return loss(at.layout.value(tensors), labels)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What passes from stage ``index`` to the stage above it. All shapes are of one whole batch, batch dimension first.

    Attributes:
        specs: of the bundle that crosses.
        context: of the bundle that rides along: the labels first.
        output: of the whole network's output.
        loss: (output, labels) -> scalar, the mean over the rows: the user's own.
        normalised: whether the stage ends in a normalisation: no update changes the activation's size much.
        depth: how many weight matrices or kernels the stage learns (``depth_of``).
        uppermost: whether the stage above it is the last one.
        conditioned: whether a direct DNI here may see the labels.
        label: which of the context are the labels.
        outlet: where among what the network gives the output lies; None: it is all.
        whole_batches: whether ``loss`` is of whole batches only: of fewer rows it is another one, or fails.
    """

    index: int
    specs: Specs
    context: Specs
    output: TensorSpec
    loss: Callable[[Tensor, Any], Tensor]
    normalised: bool = False
    depth: int = 1
    uppermost: bool = False
    conditioned: bool = True
    whole_batches: bool = False
    label: int = 0
    outlet: MainOutput | None = None

    @property
    def activation(self) -> TensorSpec:
        """The tensor that a DNI predicts the gradient of: the first differentiable one, or the first of all."""
        there = [spec for spec in self.specs if spec is not None]
        return next((spec for spec in there if spec.differentiable), there[0])

    def with_loss(self, loss: Callable[[Any, Any], Tensor]) -> Cut:
        """The same with the loss of a recipe."""
        return replace(self, loss=loss if self.outlet is None else self.outlet.loss(loss))

    @property
    def labels(self) -> TensorSpec:
        labels = self.context[self.label]
        assert labels is not None, "every batch has labels"
        return labels

    @property
    def classes(self) -> int | None:
        """Number of classes of integer labels, read off the output; None: the labels are no class indices.

        The output is [*labels, classes] (rows or tokens) or, as in image segmentation, [batch, classes, ...].
        """
        dtype = self.labels.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            return None
        labels, output = self.labels.shape, self.output.shape
        if len(output) != len(labels) + 1:
            return None
        if output[:-1] == labels:
            return output[-1]
        if output[0] == labels[0] and output[2:] == labels[1:]:
            return output[1]
        return None

    @property
    def per_token(self) -> bool:
        """Whether every position has its own label: labels [batch, time], activation [batch, time, width].

        The rows of a DNI are then the batch * time positions; else the samples, all features in a line.
        """
        return len(self.labels.shape) > 1 and self.activation.shape[:-1] == self.labels.shape

    @property
    def features(self) -> int:
        """Numbers in one row of the activation."""
        return math.prod(self.activation.shape[-1:] if self.per_token else self.activation.shape[1:])

    @property
    def rows_per_sample(self) -> int:
        """Rows of the DNI in one sample of the batch: its positions, or 1."""
        return math.prod(self.labels.shape[1:]) if self.per_token else 1
