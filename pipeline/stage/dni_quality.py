"""How good a synthetic gradient was: compared, for a sampled batch, with the true gradient that came down the pipeline.

    batch b, sampled   h --graph kept--> s = DNI(h, y) -> dL/dW under s   (the update, as always)
    later              g, the true gradient of that forward pass, through the same graph -> dL/dW under g

What counts is the gradient of the weights: a prediction may point where g does, element by element, and still train
badly, since the weights see sums over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Quality", "compare"]


@dataclass(frozen=True)
class Quality:
    """One stage, one batch. Where a stage trains no parameter, s and g themselves are compared."""

    batch: int
    cosine: float  # between the gradients of the stage's parameters under s and under g; 1 is perfect, 0 is no help
    norm_ratio: float  # norm of the former over norm of the latter
    error: float  # |s - g|^2 / |g|^2 at the cut; 1 is no better than zeros


def compare(
    batch: int, s: Tensor, g: Tensor, under_s: Sequence[Tensor | None], under_g: Sequence[Tensor | None]
) -> Quality:
    """The quality of a synthetic gradient ``s`` beside the true ``g``, from the gradients of all parameters under both.

    A None among these counts as zeros. Cosine and ratio are 0 where one of the norms is; the error is infinite where g
    is zero and s is not.
    """
    dot = sum(_dot(a, b) for a, b in zip(under_s, under_g, strict=True))
    norm_s, norm_g = (sum(_dot(a, a) for a in gradients) ** 0.5 for gradients in (under_s, under_g))
    error, size = float(torch.linalg.vector_norm(s - g)), float(torch.linalg.vector_norm(g))
    return Quality(
        batch=batch,
        cosine=dot / (norm_s * norm_g) if norm_s and norm_g else 0.0,
        norm_ratio=norm_s / norm_g if norm_g else 0.0,
        error=(error / size) ** 2 if size else (float("inf") if error else 0.0),
    )


def _dot(a: Tensor | None, b: Tensor | None) -> float:
    return 0.0 if a is None or b is None else float((a * b).sum())
