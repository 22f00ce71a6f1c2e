"""What next? A policy is a pure function from what lies in a stage's queues to the stage's next action.

time ->            F = forward, B = backward and step, U = update from the synthetic gradient, L = learn
naive              k=0  F0 .  .  .  B0 F1 .  .  .  B1
                   k=1  .  F0 .  B0 .  .  F1 .  B1
                   k=2  .  .  F0B0  .  .  .  F1B1
unlocked           k=0  F0U0 F1U1 L0 F2U2 L1 F3U3 ...       nobody waits for a gradient
                   k=1  .    F0U0 F1U1 L0 F2U2 L1 ...
                   k=2  .    .    F0U0 F1U1 F2U2 ...        the last stage has the loss
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Action", "Policy", "View", "naive", "policy_for", "scripted", "unlocked"]


class Action(enum.Enum):
    """What a stage can do."""

    FORWARD = "F"  # take what is next from below, compute, send it on
    BACKWARD = "B"  # take the true gradient of the oldest open batch (the last stage: the loss), backpropagate, step
    UPDATE = "U"  # update from the synthetic gradient of the oldest open batch (the last stage: from the loss)
    LEARN = "L"  # take a true gradient: train the DNI, relay
    WAIT = "."  # until something changes


@dataclass(frozen=True, slots=True)
class View:
    """All a policy may know.

    Attributes:
        last: whether this stage has the loss.
        forwarded: training batches whose forward is done.
        updated: training batches whose update is done.
        activation: something waits to be taken from below (stage 0: from the loader).
        gradient: a gradient waits to be taken from above.
        room: a send to the stage above would not block.
        actions: actions taken so far.
    """

    last: bool = False
    forwarded: int = 0
    updated: int = 0
    activation: bool = False
    gradient: bool = False
    room: bool = True
    actions: int = 0


Policy = Callable[[View], Action]


def naive(view: View) -> Action:
    """Locked, one batch at a time: forward through all stages, then backward through all stages."""
    if view.updated < view.forwarded:
        return Action.BACKWARD if view.last or view.gradient else Action.WAIT
    return Action.FORWARD if view.activation and view.room else Action.WAIT


def unlocked(view: View) -> Action:
    """Update at once; learn from a true gradient as soon as there is one; otherwise take the next batch."""
    if view.updated < view.forwarded:
        return Action.UPDATE
    if view.gradient:
        return Action.LEARN
    return Action.FORWARD if view.activation and view.room else Action.WAIT


def scripted(order: Sequence[Action]) -> Policy:
    """Follow a fixed order of actions, waiting for what each needs: this makes an unlocked run repeatable.

    Args:
        order: the actions of one stage, e.g. from ``reference.schedule``; after its end the stage waits.
    """

    def policy(view: View) -> Action:
        if view.actions >= len(order):
            return Action.WAIT
        action = order[view.actions]
        ready = {
            Action.FORWARD: view.activation and view.room,
            Action.BACKWARD: view.last or view.gradient,
            Action.UPDATE: view.updated < view.forwarded,
            Action.LEARN: view.gradient,
        }
        return action if ready[action] else Action.WAIT

    return policy


POLICIES: dict[str, Policy] = {"naive": naive, "unlocked": unlocked}


def policy_for(mode: str) -> Policy:
    """The policy of a mode of the plan."""
    return POLICIES[mode]
