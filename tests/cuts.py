"""Cuts for tests: one activation, one tensor of labels, a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.messages.bundle import TensorSpec
from pipeline.model.cut import Cut

Shape = tuple[int, ...]


def cut_like(
    activation: Shape,
    labels: Shape,
    output: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    labels_dtype: torch.dtype = torch.int64,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    index: int = 0,
    **rest: Any,
) -> Cut:
    """A cut that one tensor crosses.

    Args:
        activation: [batch, ...] of what crosses.
        labels: [batch, ...] of what rides along.
        output: [batch, ...] of what the whole network gives.
        dtype: of the activation.
        labels_dtype: of the labels.
        loss: (output, labels) -> scalar.
        index: of the stage below.
        **rest: fields of ``Cut``.
    """
    return Cut(
        index=index,
        specs=(TensorSpec("h", activation, dtype, dtype.is_floating_point),),
        context=(TensorSpec("labels", labels, labels_dtype),),
        output=TensorSpec("output", output, torch.float32),
        loss=loss,
        **rest,
    )


def changed(cut: Cut, **what: Any) -> Cut:
    """The same cut with other arguments of ``cut_like``."""
    plain = {name: getattr(cut, name) for name in ("normalised", "depth", "uppermost", "conditioned", "whole_batches")}
    shapes = {name: getattr(cut, name).shape for name in ("activation", "labels", "output")}
    dtypes = {"dtype": cut.activation.dtype, "labels_dtype": cut.labels.dtype}
    return cut_like(**{**plain, **shapes, **dtypes, "loss": cut.loss, "index": cut.index, **what})
