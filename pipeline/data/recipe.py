"""A recipe: the model, the batches and the loss of one training problem, and what its batches look like."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.data.batch import Minibatch, as_batch, part, rows_of, tensors_of_value
from pipeline.data.stream import Stream
from pipeline.errors import PlanError
from pipeline.messages.bundle import Bundle, present
from pipeline.messages.nesting import Nesting
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
"""The simplest mini-batch: (inputs, labels), both with the batch dimension first."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training problem.

    Attributes:
        name: how it is called in reports.
        model: builds the whole, unsplit network; called once per process under the plan's seed.
        batches: batch i of the training data, a function of i alone; or batches, gone through in order again and again:
            a list of them, a ``DataLoader``, anything that can be iterated more than once. A batch is (inputs, labels),
            a dict of the model's arguments, or the inputs alone (``pipeline.data.batch``). All have the same shape.
        loss: (output, labels) -> scalar, the mean over the rows.
        evaluation: the held-out batches in a fixed order, or a function that gives them; None: no evaluation. The last
            one may be smaller.
        correct: (output, labels) -> number of right answers, as a tensor, and how many there could be; None: loss only.
        steps: number of batches to train on when the plan does not say.
        labels: how the tensors that travel as context lie in what ``loss`` and ``correct`` take; None: as they travel.
    """

    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Any] | Iterable[Any]
    loss: Callable[[Any, Any], Tensor]
    evaluation: Callable[[], Iterable[Any]] | Iterable[Any] | None = None
    correct: Callable[[Any, Any], tuple[Tensor, int]] | None = None
    steps: int = 1000
    labels: Nesting | None = None

    @cached_property
    def careful_loss(self) -> Callable[[Any, Any], Tensor]:
        """The loss; it leaves output and labels as they are, should the user's write into them."""
        return Unwritten(self.loss)

    def arranged(self, labels: Nesting) -> Recipe:
        """The same with a loss, and ``correct``, that take the labels as they travel: a tensor, or a tuple of them."""
        if labels.alone or self.labels is not None:
            return self
        correct = None if self.correct is None else partial(_arranged, self.correct, labels)
        return dataclasses.replace(self, loss=partial(_arranged, self.loss, labels), correct=correct, labels=labels)

    @cached_property
    def careful_correct(self) -> Callable[[Any, Any], tuple[Tensor, int]] | None:
        """As ``careful_loss``."""
        return None if self.correct is None else Unwritten(self.correct)

    def batch(self, index: int, seed: int = 0) -> Minibatch:
        """Training batch ``index``, or RecipeFailed; ``seed`` is that of a loader's order."""
        if callable(self.batches):
            with calling(f"batches({index})"):
                return as_batch(self.batches(index))
        if self._stream is not None:
            with calling(f"batches, number {index}"):
                return as_batch(self._stream.batch(seed, index))
        batches = cast(Sequence[Any], self.batches)
        return as_batch(batches[index % len(batches)])

    @cached_property
    def _stream(self) -> Stream | None:
        """What ``batches`` are read from, where they have no numbers."""
        return None if callable(self.batches) or _numbered(self.batches) else Stream(self.batches)

    def seeded_batch(self, seed: int, index: int) -> Minibatch:
        """Training batch ``index``; whatever is random in it is drawn from (seed, index)."""
        if isinstance(self.batches, list | tuple):  # nothing is random, and batches may be small
            return self.batch(index)
        with seeded(seed, "batch", index):
            return self.batch(index, seed)

    def held_out(self) -> Iterator[Minibatch]:
        """The held-out batches, none without ``evaluation``; what is random in them is the same for every seed."""
        with seeded(0, "held out"):
            given = self.evaluation() if callable(self.evaluation) else self.evaluation
            batches = iter(() if given is None else given)
        for index in itertools.count():
            with seeded(0, "held out", index):
                batch = next(batches, None)
            if batch is None:
                return
            yield as_batch(batch)


def _arranged(call: Callable[[Any, Any], Any], labels: Nesting, output: Any, given: Any) -> Any:
    return call(output, labels.value(given if isinstance(given, tuple) else (given,)))


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


def _numbered(batches: Any) -> bool:
    return isinstance(batches, Sequence)


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


def check_batches(recipe: Recipe, plan: Plan) -> Minibatch:
    """Check a list of batches, the first of a loader, or the first two and the last of a function; return batch 0."""
    if callable(recipe.batches):
        last = (plan.steps or recipe.steps) * plan.replicas - 1
        indices: Iterable[int] = sorted({0, min(1, last), last})
    elif isinstance(recipe.batches, torch.utils.data.Dataset):
        raise PlanError(
            f"batches is a {type(recipe.batches).__name__}, whose items are single samples: give a "
            "torch.utils.data.DataLoader(dataset, batch_size=..., drop_last=True)."
        )
    elif not _numbered(recipe.batches):
        if not isinstance(recipe.batches, Iterable) or isinstance(recipe.batches, Iterator):
            raise PlanError(
                f"batches is a {type(recipe.batches).__name__}: give a function of the batch's number, a list of "
                "batches, a DataLoader, or what else can be iterated more than once."
            )
        indices = [0]
    elif not recipe.batches:
        raise PlanError("batches is empty: give at least one (inputs, labels).")
    else:
        indices = range(len(cast(Sequence[Any], recipe.batches)))
    first = _checked(recipe.seeded_batch(plan.seed, 0), 0)
    for index in indices:
        same_shape(index, _checked(recipe.seeded_batch(plan.seed, index), index), first)
    return first


def check_scores(recipe: Recipe, output: Tensor, labels: Any) -> None:
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
        rows, loss = len(output) // 2, recipe.careful_loss
        try:
            parts = slice(2 * rows), slice(rows), slice(rows, 2 * rows)
            whole, *halves = (float(loss(output[these], part(labels, these, len(output)))) for these in parts)
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


def same_shape(index: int, batch: Minibatch, first: Minibatch) -> None:
    """Raise PlanError unless batch ``index`` has the shapes and dtypes of the first one."""
    for what, mine, expected in zip(("inputs", "labels"), batch, first, strict=True):
        one, other = tensors_of_value(mine), tensors_of_value(expected)
        if not isinstance(mine, Tensor) and Nesting.of(mine) != Nesting.of(expected):
            raise PlanError(f"batch {index} has other {what} than batch 0: give every batch the same names and values.")
        for tensor, like in zip(map(present, one), map(present, other), strict=True):
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise PlanError(
                    f"batch {index} has {what} {list(tensor.shape)} {tensor.dtype}, batch 0 has {list(like.shape)} "
                    f"{like.dtype}: all training batches must be alike; drop or fill up the smaller one."
                )


def _checked(batch: Minibatch, index: int) -> Minibatch:
    """A batch whose tensors have the same rows."""
    inputs, labels = tensors_of_value(batch.inputs), tensors_of_value(batch.labels)
    if not inputs:
        given = batch.inputs
        of = f" of {', '.join(type(t).__name__ for t in given[:9])}" if isinstance(given, tuple | list) else ""
        raise PlanError(
            f"batch {index} is a {type(given).__name__}{of}: give tensors or arrays, as (inputs, labels), as a dict of "
            "the model's arguments, or the inputs alone."
        )
    sizes = {present(tensor).shape[:1] for tensor in (*inputs, *labels)}
    if sizes != {torch.Size([rows_of(batch)])} or not rows_of(batch):
        raise PlanError(
            f"batch {index} has inputs {_shapes(inputs)} and labels {_shapes(labels)}: both need the same, non-zero "
            "number of rows."
        )
    return batch


def _shapes(tensors: Bundle) -> str:
    return ", ".join(str(list(present(tensor).shape)) for tensor in tensors)
