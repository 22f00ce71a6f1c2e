"""What comes into stage 0, in order: training batches, passes over the held-out batches, and the END.

A0 A1 A2 ... A(n-1)  E0 E1 .. E(m-1) REPORT(n)  An ...  END        A = training batch, E = held-out batch

When it is enough before all batches are through, a last pass over the held-out batches and the END come at once.

Replica r of R takes batch i R + r as its batch i, and only replica 0 goes through the held-out batches. Where replicas
average their weights, TRAINED comes behind the last training batch, before the last pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pipeline.data.recipe import Batch, Recipe, same_shape
from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message
from pipeline.plan.plan import Plan
from pipeline.plan.replica_layout import batch_of
from pipeline.schedule.modes import MODES

__all__ = ["SOURCE", "evaluation_steps", "inputs", "phantom_inputs"]

SOURCE = -1
"""The ``stage`` of messages that come from the data."""


def evaluation_steps(plan: Plan, steps: int) -> set[int]:
    """After how many batches the held-out data is gone through: every ``evaluate_every``, and at the end."""
    every = plan.evaluate_every
    return {steps, *(range(every, steps, every) if every else ())}


def inputs(
    recipe: Recipe, plan: Plan, steps: int, enough: Callable[[int], bool] = lambda step: False, replica: int = 0
) -> Iterator[Message]:
    """The messages of a whole run, for one replica.

    Args:
        recipe: gives the batches.
        plan: says how to cut them, and how often to evaluate.
        steps: training batches.
        enough: asked before every training batch, with its number; once it is, no more of them come.
        replica: which one.

    Raises:
        PlanError: a training batch of another shape than batch 0, on reaching it.
    """
    first: Batch | None = None
    evaluates = recipe.evaluation is not None and replica == 0
    passes = evaluation_steps(plan, steps) if evaluates else set()
    seen = -1  # after how many batches the last pass was
    for step in range(steps):
        if enough(step):
            steps = step
            break
        batch = recipe.seeded_batch(plan.seed, batch_of(plan, replica, step))
        first = first or batch
        same_shape(batch_of(plan, replica, step), batch, first)
        for index, part in enumerate(_cut(batch, plan.microbatches)):
            yield Message(Kind.ACTIVATION, Item(step, index), SOURCE, part[:1], part[1:])
        if step + 1 in passes and step + 1 < steps:
            yield from _held_out(recipe, step + 1)
            seen = step + 1
    if _says_trained(plan):
        yield Message(Kind.TRAINED, Item(steps), SOURCE)
    if evaluates and (seen < steps or _says_trained(plan)):
        yield from _held_out(recipe, steps)
    yield Message(Kind.END, Item(steps), SOURCE)


def phantom_inputs(plan: Plan, steps: int, held_out_batches: int, replica: int = 0) -> Iterator[Message]:
    """The same order of messages without any data: for planning."""
    passes = evaluation_steps(plan, steps) if held_out_batches and replica == 0 else set()
    nothing = (torch.empty(0),)
    for step in range(steps):
        for index in range(plan.microbatches):
            yield Message(Kind.ACTIVATION, Item(step, index), SOURCE, nothing, nothing)
        if step + 1 == steps and _says_trained(plan):
            yield Message(Kind.TRAINED, Item(steps), SOURCE)
        if step + 1 in passes:
            yield from (
                Message(Kind.EVALUATION, Item(index), SOURCE, nothing, nothing) for index in range(held_out_batches)
            )
            yield Message(Kind.REPORT, Item(step + 1), SOURCE)
    yield Message(Kind.END, Item(steps), SOURCE)


def _held_out(recipe: Recipe, updates: int) -> Iterator[Message]:
    """One pass over the held-out batches, after so many training batches."""
    if recipe.evaluation is not None:
        for index, batch in enumerate(recipe.held_out()):
            yield Message(Kind.EVALUATION, Item(index), SOURCE, tuple(batch)[:1], tuple(batch)[1:])
        yield Message(Kind.REPORT, Item(updates), SOURCE)


def _says_trained(plan: Plan) -> bool:
    return plan.replicas > 1 and MODES[plan.mode].averages == "weights"


def _cut(batch: Batch, parts: int) -> Iterator[Batch]:
    return zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True)
