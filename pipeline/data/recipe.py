"""A recipe: the model, the batches and the loss of one training problem, and what its batches look like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import PlanError
from pipeline.model.given_model import check_model, in_training_mode
from pipeline.model.unwritten import Unwritten
from pipeline.plan.plan import Plan
from pipeline.seeding import derived_seed, seeded
from pipeline.user_code import calling

__all__ = [
    "ArrayBatches",
    "Batch",
    "Recipe",
    "build_model",
    "check_batches",
    "check_scores",
    "correct_predictions",
    "label_problem",
    "open_data",
    "same_shape",
]

Batch = tuple[Tensor, Tensor]
"""One mini-batch: (inputs, labels), both with the batch dimension first."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training problem.

    Attributes:
        name: how it is called in reports.
        model: builds the whole, unsplit network; called once per process under the plan's seed.
        batches: batch i of the training data, a function of i alone; or a sequence of batches, gone through in order
            again and again. Every batch has the same shape.
        loss: (output, labels) -> scalar, the mean over the rows.
        evaluation: the held-out batches, in a fixed order; None: no evaluation. The last one may be smaller.
        correct: (output, labels) -> number of right answers, as a tensor, and how many there could be; None: loss only.
        steps: number of batches to train on when the plan does not say.
    """

    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Batch] | Sequence[Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    evaluation: Callable[[], Iterable[Batch]] | None = None
    correct: Callable[[Tensor, Tensor], tuple[Tensor, int]] | None = None
    steps: int = 1000

    @cached_property
    def careful_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss, which leaves output and labels as they are, should the user's write into them."""
        return Unwritten(self.loss)

    @cached_property
    def careful_correct(self) -> Callable[[Tensor, Tensor], tuple[Tensor, int]] | None:
        """As ``careful_loss``."""
        return None if self.correct is None else Unwritten(self.correct)

    def batch(self, index: int) -> Batch:
        """Training batch ``index``, or RecipeFailed."""
        if callable(self.batches):
            with calling(f"batches({index})"):
                return self.batches(index)
        return self.batches[index % len(self.batches)]

    def seeded_batch(self, seed: int, index: int) -> Batch:
        """Training batch ``index``; whatever is random in it is drawn from (seed, index)."""
        if isinstance(self.batches, list | tuple):  # nothing is random, and batches may be small
            return self.batch(index)
        with seeded(seed, "batch", index):
            return self.batch(index)

    def held_out(self) -> Iterator[Batch]:
        """The held-out batches, none without ``evaluation``; what is random in them is the same for every seed."""
        with seeded(0, "held out"):
            batches = iter(self.evaluation() if self.evaluation else ())
        for index in itertools.count():
            with seeded(0, "held out", index):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


@dataclass(frozen=True)
class ArrayBatches:
    """Batches of one size drawn from arrays that fit in memory; each epoch is a new permutation from (seed, epoch).

    ``inputs`` and ``labels`` are [num_rows, ...], ``seed`` is that of the order.
    """

    inputs: Tensor
    labels: Tensor
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        rows, labels = len(self.inputs), len(self.labels)
        if rows != labels:
            raise PlanError(f"{rows} rows of inputs and {labels} of labels: give a label for every row.")
        if not 1 <= self.batch_size <= rows:
            raise PlanError(f"batch is {self.batch_size}: give 1 to {rows}, the rows of the data.")

    def __call__(self, index: int) -> Batch:
        per_epoch = len(self.inputs) // self.batch_size
        epoch, position = divmod(index, per_epoch)
        order = _epoch_order(len(self.inputs), self.seed, epoch)
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        return self.inputs.index_select(0, rows), self.labels.index_select(0, rows)  # twice as fast as [rows]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
    return torch.randperm(num_rows, generator=generator)


def build_model(recipe: Recipe, seed: int) -> nn.Module:
    """The whole network with the weights that ``seed`` gives, in training mode; PlanError where there is none."""
    with seeded(seed, "weights"):
        with calling("model()"):
            model = recipe.model()
        check_model(model)
        with calling("model().train()"):
            return in_training_mode(model)


def open_data(recipe: Recipe, plan: Plan) -> None:
    """On the way to a goal, have the recipe import and read what it needs before the clock starts."""
    if plan.goal is not None:
        recipe.seeded_batch(plan.seed, 0)
        next(recipe.held_out(), None)


def correct_predictions(output: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Right answers of a classifier: output [..., classes] against integer labels [...]."""
    return (output.argmax(dim=-1) == labels).sum(), labels.numel()


def check_batches(recipe: Recipe, plan: Plan) -> Batch:
    """Check a sequence of batches, or the first two and the last one of a function, and return batch 0."""
    if callable(recipe.batches):
        last = (plan.steps or recipe.steps) * plan.replicas - 1
        indices: Iterable[int] = sorted({0, min(1, last), last})
    elif not recipe.batches:
        raise PlanError("batches is empty: give at least one (inputs, labels).")
    elif not hasattr(recipe.batches, "__getitem__"):
        raise PlanError(
            f"batches is a {type(recipe.batches).__name__}: give a function of the batch's number, such as "
            "freewheel.ArrayBatches(inputs, labels, batch_size), or a list: list(loader) is one of all batches in "
            "memory; the loader has to drop the last, smaller one."
        )
    else:
        indices = range(len(recipe.batches))
    first = _checked(recipe.seeded_batch(plan.seed, 0), 0)
    for index in indices:
        same_shape(index, _checked(recipe.seeded_batch(plan.seed, index), index), first)
    return first


def check_scores(recipe: Recipe, output: Tensor, labels: Tensor) -> None:
    """Try ``correct`` and ``loss`` on what a network may give for ``labels``, both [rows, ...].

    PlanError: ``correct`` raises something, or gives no pair of numbers; or the loss is a sum over the rows.
    """
    with torch.no_grad():
        if recipe.careful_correct is not None:
            with calling("correct()"):
                given: Any = recipe.careful_correct(output, labels)
                try:
                    right, answers = given
                    float(right), float(answers)
                except (TypeError, ValueError, RuntimeError):
                    raise PlanError(
                        f"correct() gives a {type(given).__name__}: give a pair, the number of right answers and how "
                        "many there could be, as freewheel.correct_predictions does."
                    ) from None
        rows, loss = len(labels) // 2, recipe.careful_loss
        try:
            parts = slice(2 * rows), slice(rows), slice(rows, 2 * rows)
            whole, *halves = (float(loss(output[part], labels[part])) for part in parts)
        except Exception:  # it only takes whole batches, or other values: nothing is known then
            return
    if math.isfinite(whole) and whole and math.isclose(whole, sum(halves), rel_tol=1e-4):
        raise PlanError(
            f"the loss of {2 * rows} rows is the sum of the losses of its halves, {whole:.4g}: give the mean over the "
            "rows, as reduction='mean' does, or divide by len(labels)."
        )


def label_problem(labels: Tensor, output_shape: Sequence[int]) -> str | None:
    """Which label [rows, ...] has no class in an output [rows, classes, ...] or [rows, ..., classes]; None: all have
    one (-100 is left out by ``torch``'s losses), or these are no classes.
    """
    if labels.is_floating_point() or labels.numel() == 0:
        return None
    shape, output_shape = tuple(labels.shape[1:]), tuple(output_shape[1:])
    places = {0: output_shape[1:], -1: output_shape[:-1]}
    classes = max((output_shape[at] for at, rest in places.items() if output_shape and rest == shape), default=0)
    wrong = labels[(labels >= classes) | ((labels < 0) & (labels != -100))]
    if not classes or wrong.numel() == 0:
        return None
    return (
        f"label {int(wrong.flatten()[0])} is out of range, as the network's output has {classes} classes, 0 to "
        f"{classes - 1}: mend the labels, or give the last layer more outputs"
    )


def same_shape(index: int, batch: Batch, first: Batch) -> None:
    """Raise PlanError unless batch ``index`` has the shapes and dtypes of the first one."""
    for what, mine, expected in zip(("inputs", "labels"), batch, first, strict=True):
        if mine.shape != expected.shape or mine.dtype != expected.dtype:
            raise PlanError(
                f"batch {index} has {what} {list(mine.shape)} {mine.dtype}, batch 0 has {list(expected.shape)} "
                f"{expected.dtype}: all training batches must be alike; drop or fill up the smaller one."
            )


def _checked(batch: Any, index: int) -> Batch:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        of = f" of {', '.join(type(t).__name__ for t in batch[:9])}" if isinstance(batch, tuple | list) else ""
        raise PlanError(f"batch {index} is a {type(batch).__name__}{of}: give a pair of tensors (inputs, labels).")
    inputs, labels = batch
    if inputs.dim() == 0 or labels.dim() == 0 or len(inputs) == 0 or len(inputs) != len(labels):
        raise PlanError(
            f"batch {index} has inputs {list(inputs.shape)} and labels {list(labels.shape)}: both need the same, "
            "non-zero number of rows."
        )
    return inputs, labels
