"""What comes into stage 0, in order: training batches, passes over the held-out batches, and the END.

A0 A1 A2 ... A(n-1)  E0 E1 .. E(m-1) REPORT(n)  An ...  END        A = training batch, E = held-out batch

When it is enough before all batches are through, a last pass over the held-out batches and the END come at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pipeline.messages import Kind, Message
from pipeline.plan import Plan
from pipeline.recipe import Batch, Recipe, same_shape

__all__ = ["SOURCE", "evaluation_steps", "inputs", "phantom_inputs"]

SOURCE = -1
"""The ``stage`` of messages that come from the data."""


def evaluation_steps(plan: Plan, steps: int) -> set[int]:
    """After how many batches the held-out data is gone through: every ``evaluate_every``, and at the end."""
    every = plan.evaluate_every
    return {steps, *(range(every, steps, every) if every else ())}


def inputs(recipe: Recipe, plan: Plan, steps: int, enough: Callable[[], bool] = lambda: False) -> Iterator[Message]:
    """The messages of a whole run.

    Args:
        recipe: gives the batches.
        plan: says how to cut them, and how often to evaluate.
        steps: training batches.
        enough: asked before every training batch; once it is, no more of them come.

    Raises:
        PlanError: a training batch of another shape than batch 0, on reaching it.
    """
    first: Batch | None = None
    passes = evaluation_steps(plan, steps) if recipe.evaluation is not None else set()
    for step in range(steps):
        if enough():
            if step not in passes:
                yield from _held_out(recipe, step)
            steps = step
            break
        batch = recipe.seeded_batch(plan.seed, step)
        first = first or batch
        same_shape(step, batch, first)
        for index, part in enumerate(_cut(batch, plan.microbatches)):
            yield Message(Kind.ACTIVATION, step, SOURCE, part, microbatch=index)
        if step + 1 in passes:
            yield from _held_out(recipe, step + 1)
    yield Message(Kind.END, steps, SOURCE)


def phantom_inputs(plan: Plan, steps: int, held_out_batches: int) -> Iterator[Message]:
    """The same order of messages without any data: for planning."""
    passes = evaluation_steps(plan, steps) if held_out_batches else set()
    nothing = (torch.empty(0), torch.empty(0))
    for step in range(steps):
        for index in range(plan.microbatches):
            yield Message(Kind.ACTIVATION, step, SOURCE, nothing, microbatch=index)
        if step + 1 in passes:
            yield from (Message(Kind.EVALUATION, index, SOURCE, nothing) for index in range(held_out_batches))
            yield Message(Kind.REPORT, step + 1, SOURCE)
    yield Message(Kind.END, steps, SOURCE)


def _held_out(recipe: Recipe, updates: int) -> Iterator[Message]:
    """One pass over the held-out batches, after so many training batches."""
    if recipe.evaluation is not None:
        for index, batch in enumerate(recipe.evaluation()):
            yield Message(Kind.EVALUATION, index, SOURCE, tuple(batch))
        yield Message(Kind.REPORT, updates, SOURCE)


def _cut(batch: Batch, parts: int) -> Iterator[Batch]:
    return zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True)
