"""What comes into stage 0, in order: training batches, passes over the held-out batches, and the END.

A0 A1 A2 ... A(n-1)  E0 E1 .. E(m-1) REPORT(n)  An ...  END        A = training batch, E = held-out batch

When it is enough before all batches are through, a last pass over the held-out batches and the END come at once.

Replica r of R takes batch i R + r as its batch i, and only replica 0 goes through the held-out batches. Where replicas
average their weights, TRAINED comes behind the last training batch, before the last pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from pipeline.data.batch import Minibatch, chunks
from pipeline.data.recipe import Recipe, same_shape
from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message
from pipeline.plan.plan import Plan
from pipeline.plan.replica_layout import batch_of
from pipeline.schedule.modes import MODES

__all__ = ["evaluation_steps", "inputs", "phantom_inputs"]

_SOURCE = -1  # the ``stage`` of messages that come from the data


def evaluation_steps(plan: Plan, steps: int) -> set[int]:
    """After how many batches the held-out data is gone through: every ``evaluate_every``, and at the end."""
    every = plan.evaluate_every
    return {steps, *(range(every, steps, every) if every else ())}


def inputs(
    recipe: Recipe, plan: Plan, steps: int, enough: Callable[[int], bool] = lambda step: False, replica: int = 0
) -> Iterator[Message]:
    """The messages of a whole run, for one replica.

    ``enough`` is asked before every training batch, with its number; once it is, no more of them come. PlanError: a
    training batch has another shape than batch 0, on reaching it.
    """
    first: Minibatch | None = None

    def microbatches(step: int) -> Iterable[Minibatch]:
        nonlocal first
        index = batch_of(plan, replica, step)
        batch = recipe.seeded_batch(plan.seed, index)
        first = first or batch
        same_shape(index, batch, first)
        if plan.microbatches == 1:
            return [batch]
        parts = zip(*(chunks(value, plan.microbatches) for value in batch), strict=True)
        return [Minibatch(*each) for each in parts]

    evaluates = recipe.evaluation is not None and replica == 0
    return _in_order(plan, steps, enough, microbatches, recipe.held_out if evaluates else None)


def phantom_inputs(plan: Plan, steps: int, held_out_batches: int, replica: int = 0) -> Iterator[Message]:
    """The same order of messages without any data: for planning."""
    nothing = Minibatch(torch.empty(0), torch.empty(0))
    parts, held_out = [nothing] * plan.microbatches, [nothing] * held_out_batches
    evaluates = bool(held_out) and replica == 0
    return _in_order(plan, steps, lambda step: False, lambda step: parts, (lambda: held_out) if evaluates else None)


def _in_order(
    plan: Plan,
    steps: int,
    enough: Callable[[int], bool],
    microbatches: Callable[[int], Iterable[Minibatch]],
    held_out: Callable[[], Iterable[Minibatch]] | None,
) -> Iterator[Message]:
    says_trained = (plan.replicas > 1 or plan.ties is not None) and MODES[plan.mode].averages == "weights"
    passes = evaluation_steps(plan, steps) - {steps}
    evaluated = -1  # after how many batches the last pass was
    for step in range(steps):
        if enough(step):
            steps = step
            break
        for index, part in enumerate(microbatches(step)):
            yield Message(Kind.ACTIVATION, Item(step, index), _SOURCE, *part.tensors())
        if held_out is not None and step + 1 in passes:
            yield from _pass(held_out(), step + 1)
            evaluated = step + 1
    if says_trained:
        yield Message(Kind.TRAINED, Item(steps), _SOURCE)
    if held_out is not None and (evaluated < steps or says_trained):
        yield from _pass(held_out(), steps)
    yield Message(Kind.END, Item(steps), _SOURCE)


def _pass(batches: Iterable[Minibatch], updates: int) -> Iterator[Message]:
    """One pass over the held-out batches, after so many training batches."""
    for index, batch in enumerate(batches):
        yield Message(Kind.EVALUATION, Item(index), _SOURCE, *batch.tensors())
    yield Message(Kind.REPORT, Item(updates), _SOURCE)
