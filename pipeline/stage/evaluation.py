"""How good a network is on held-out batches, summed up batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from pipeline.data.recipe import Recipe
from pipeline.messages.bundle import as_bundle, as_value, present
from pipeline.messages.nesting import Nesting
from pipeline.model.compute import ComputeContext
from pipeline.model.given_model import ModuleModes
from pipeline.plan.plan import Plan

__all__ = ["EvaluationMetrics", "scores_of"]


@dataclass(slots=True)
class EvaluationMetrics:
    """Sums over the held-out batches of one pass."""

    loss_sum: float = 0.0
    rows: int = 0
    correct: float = 0.0
    answers: int = 0

    def add(self, recipe: Recipe, output: Any, labels: Any) -> None:
        if recipe.careful_correct is not None:
            correct, answers = recipe.careful_correct(output, labels)
            self.correct += float(correct)
            self.answers += answers
        rows = len(present(as_bundle(labels)[0]))
        self.loss_sum += float(recipe.careful_loss(output, labels)) * rows
        self.rows += rows

    def loss(self) -> float:
        """Mean loss per row; NaN of no rows, which meets no goal."""
        return self.loss_sum / self.rows if self.rows else math.nan

    def accuracy(self) -> float | None:
        """Share of right answers, or None for a recipe without."""
        return self.correct / self.answers if self.answers else None


@torch.no_grad()
def scores_of(
    recipe: Recipe, network: nn.Module, computing: ComputeContext | None = None, first: int = 0, every: int = 1
) -> EvaluationMetrics:
    """The held-out batches through a whole network in evaluation mode; afterwards its modules train as before.

    Takes every n-th batch (``every``) from ``first`` on. Without ``computing``: plainly, on the CPU.
    """
    scores, computing = EvaluationMetrics(), computing or ComputeContext(Plan())
    modes = ModuleModes(network)
    modes.switch(False)
    for batch in islice(recipe.held_out(), first, None, every):
        inputs, labels = (as_value(computing.brought(each)) for each in batch.tensors())
        with computing.autocast():
            scores.add(recipe.arranged(Nesting.of(batch.labels)), network(inputs), labels)
    modes.switch(True)
    return scores
