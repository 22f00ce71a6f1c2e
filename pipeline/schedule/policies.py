"""What next? A policy is a pure function from what lies in a stage's queues to the stage's next action.

Locked: a stage steps only after the true gradients of the whole batch came back.

    time ->     F = forward, B = backward (and step after the batch's last one), k = stage, one tick each
    naive       k=0  F0 .  .  .  .  B0 F1             one batch in the whole pipeline
                k=1  .  F0 .  .  B0 .  .  F1
                k=2  .  .  F0 B0 .  .  .  .  F1
    gpipe       k=0  F0 F1 F2 F3 .  .  B0 B1 B2 B3    one batch in four microbatches: all forward, all backward
                k=1  .  F0 F1 F2 F3 B0 B1 B2 B3
    1f1b        k=0  F0 F1 .  B0 F2 B1 F3 B2 .  B3    no more than K - k microbatches open, so less is kept
                k=1  .  F0 B0 F1 B1 F2 B2 F3 B3

Not locked: a stage steps as soon as it can, batch after batch.

    async-1f1b  k=0  F0 F1 .  B0 F2 B1 F3 B2 F4 B3    whole batches; the step of b lands after the forwards of b + 1 ...
                k=1  .  F0 B0 F1 B1 F2 B2 F3 B3 F4    slow hops make it wait, or more open batches its gradients old
    unlocked    k=0  F0 U0 F1 U1 L0 F2 U2 L1 F3 U3    U = update from the synthetic gradient, L = learn
                k=1  .  F0 U0 F1 U1 F2 U2 F3 U3       the last stage has the loss
    at random   k=0  F0 S0 F1 U1 L0 F2 S2 L1 F3 U3    S = no update from this batch: it is only passed on
    local       the same without L: no gradient crosses a cut
    cut locked  k=0  F0 .  .  B0 F1 .  .  B1          unlocked, but for cut 0: see pipeline/stage/unlock.py
                k=1  .  F0 U0 .  .  F1 U1

Several replicas of the pipeline: A = take the average over the replicas of this stage.

    locked      k=1  F0 B0 .  A0 F1 B1 .  A1          the step is part of A; nothing else happens before it
    not locked  k=1  F0 U0 F1 U1 A0 F2 U2 F3 U3 A1    as soon as it is there, but never between a forward and its update
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = [
    "Action",
    "Policy",
    "View",
    "async_1f1b",
    "averaged",
    "gpipe",
    "naive",
    "one_f_one_b",
    "scripted",
    "unlocked",
]


class Action(enum.Enum):
    """What a stage can do."""

    FORWARD = "F"  # take what is next from below, compute, send it on
    BACKWARD = "B"  # backpropagate the true gradient (the last stage: the loss) of the oldest open microbatch
    UPDATE = "U"  # backpropagate the synthetic gradient (the last stage: the loss) of the oldest open batch, step
    SKIP = "S"  # leave the oldest open batch without an update
    LEARN = "L"  # take a true gradient: train the DNI, relay
    AVERAGE = "A"  # take the average over the replicas; make the step that waited for it, if one did
    WAIT = "."  # until something changes


class View(NamedTuple):
    """All a policy may know. Whole batches count as one microbatch each in modes that do not cut them."""

    stages_above: int = 1  # between this one and the loss; 0 for the last stage
    microbatches: int = 1  # per batch
    forwarded: int = 0  # microbatches whose forward is done
    backwarded: int = 0  # microbatches whose backward (or update) is done
    activation: bool = False  # something waits to be taken from below (stage 0: from the loader)
    gradient: bool = False  # a gradient waits to be taken from above
    room: bool = True  # a send to the stage above would not block
    ended: bool = False  # nothing more will come from below
    actions: int = 0  # taken so far
    average: bool = False  # the average over the replicas of this stage can be taken
    held: bool = False  # nothing else may happen before it is
    updates: bool = True  # the stage updates from its oldest open batch; else it was only passed on
    locked: bool = False  # the oldest open batch waits for its gradient, though the mode updates from synthetic ones
    late: bool = False  # the gradient that waits belongs to a batch whose update is over
    ahead: int | None = None  # async-1f1b: open batches besides one; None: as many as there are stages above

    @property
    def open(self) -> int:
        """Microbatches between their forward and their backward."""
        return self.forwarded - self.backwarded

    @property
    def all_forwarded(self) -> bool:
        """Whether every microbatch of the batch that is open is forwarded."""
        return self.forwarded == (self.backwarded // self.microbatches + 1) * self.microbatches

    @property
    def forward_if_possible(self) -> Action:
        """Forward, or wait until that is possible."""
        return Action.FORWARD if self.activation and self.room else Action.WAIT

    @property
    def backward_if_possible(self) -> Action:
        """Backward, or wait for the gradient; the last stage has the loss."""
        return Action.BACKWARD if self.gradient or not self.stages_above else Action.WAIT


Policy = Callable[[View], Action]


def naive(view: View) -> Action:
    """Locked, one batch in the whole pipeline."""
    return view.backward_if_possible if view.open else view.forward_if_possible


def gpipe(view: View) -> Action:
    """Locked: all microbatches of a batch forward, then all backward (Huang et al. 2019, GPipe, section 2.3)."""
    return view.backward_if_possible if view.all_forwarded else view.forward_if_possible


def one_f_one_b(view: View) -> Action:
    """Locked: at most K - k open microbatches (PipeDream-flush; Narayanan et al. 2021, section 2.2)."""
    full = view.open > view.stages_above
    return view.backward_if_possible if view.all_forwarded or full else view.forward_if_possible


def async_1f1b(view: View) -> Action:
    """Not locked: at most K - k open batches, no flush between them (Narayanan et al. 2019, PipeDream, section 3)."""
    full = view.open > (view.stages_above if view.ahead is None else view.ahead)
    return view.backward_if_possible if full or (view.ended and view.open) else view.forward_if_possible


def unlocked(view: View) -> Action:
    """Update at once; learn from a true gradient as soon as there is one; otherwise take the next batch.

    A batch of a locked stage waits for its gradient; meanwhile the stage learns from what comes for older ones.
    """
    if view.open and view.locked:
        return Action.LEARN if view.gradient and view.late else view.backward_if_possible
    if view.open:
        return Action.UPDATE if view.updates else Action.SKIP
    return Action.LEARN if view.gradient else view.forward_if_possible


def averaged(policy: Policy) -> Policy:
    """The policy of a stage that has replicas: take the average when it is there, and wait for it where that must be.

    Never between a batch's forward and its update, whose gradient is taken on the weights of the forward.
    """

    def with_averages(view: View) -> Action:
        action = Action.WAIT if view.held else policy(view)
        backwards = action in (Action.UPDATE, Action.BACKWARD)
        waits = view.locked and view.open > 0
        return Action.AVERAGE if view.average and not backwards and not waits else action

    return with_averages


def scripted(order: Sequence[Action]) -> Policy:
    """Follow a fixed order of actions, waiting for what each needs, so that an unlocked run repeats; then wait."""

    def policy(view: View) -> Action:
        if view.actions >= len(order):
            return Action.WAIT
        action = order[view.actions]
        ready = {
            Action.FORWARD: view.forward_if_possible is Action.FORWARD,
            Action.BACKWARD: view.backward_if_possible is Action.BACKWARD,
            Action.LEARN: view.gradient,
            Action.AVERAGE: view.average,
        }
        return action if ready.get(action, view.open > 0) else Action.WAIT

    return policy
