"""Which gradients flow to the stage below, and when: the `targets` of the plan.

    bootstrap   J^T s at the update          the synthetic gradient, taken through the stage; the loss only reaches
                                             the last DNI (Jaderberg et al. 2017, section 2.2)
    true        J^T g when g comes
    mixed       J^T (lambda g + (1-lambda) s) when g comes

Targets flow for one batch in `dni.every`, and only for these is anything computed or sent.

The last stage has the true gradient at its update; in modes that work with true gradients every stage has. In the mode
`local` nothing flows. A stage that makes no update from a batch (``update_probability``) sends down nothing of its own.
A stage below that is locked (``pipeline.stage.unlock``) gets what this one updates with, of every batch; nothing later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.plan.plan import Plan
from pipeline.schedule.modes import MODES
from pipeline.seeding import derived_seed

__all__ = ["Flow", "Locks", "Route"]


class Locks(NamedTuple):
    """Whether this stage (``mine``), and the one ``below``, waits for the gradient of a batch in mode ``unlocked``."""

    mine: bool = False
    below: bool = False


class Route(NamedTuple):
    """What a stage does with one batch, decided when it comes in."""

    locked: bool  # the stage waits for the gradient from above
    updates: bool  # the stage updates from it
    sends_now: bool  # the input gradient found at its update is sent to the stage below there and then
    awaited: bool  # the stage below waits for that one; else it is a target, which may be dropped
    wants_target: bool  # the stage's DNI learns from the gradient that comes for it
    relays: bool  # the true gradient will be taken through the stage after the update
    samples: bool  # its true gradient travels all the way to stage 0, to see how good the synthetic ones were
    stashes: bool  # the weights will change between its forward and the last backward through it
    from_true: bool  # below the last stage: it updates with the gradient of the loss, in which no DNI had a part


@dataclass(frozen=True)
class Flow:
    """What one stage sends to the stage below."""

    plan: Plan
    index: int

    @property
    def last(self) -> bool:
        """Whether this stage has the loss."""
        return self.index == self.plan.stages - 1

    @property
    def true_targets(self) -> bool:
        """Whether what this stage's DNI learns from is the gradient of the loss, not (partly) of another DNI."""
        return self.plan.targets == "true" or self.index == self.plan.stages - 2

    @property
    def window_suffices(self) -> bool:
        """Whether the stage below only trains its DNI on what it gets from this one, and passes nothing on."""
        return self.plan.unlocked and (self.index == 1 or self.plan.targets == "bootstrap")

    def route(self, batch: int, locks: Locks) -> Route:
        """What is done with a batch that comes in while these wait."""
        plan, mode = self.plan, MODES[self.plan.mode]
        updates, below_the_loss = self.updates(batch), self.index == plan.stages - 2
        in_turn = batch % (plan.dni.every or 1) == 0
        # does a target set out towards this stage: from the stage above, or from the last one?
        origin = self.index + 1 if plan.targets == "bootstrap" else plan.stages - 1
        awaits_target = plan.unlocked and not self.last and in_turn and Flow(plan, origin).updates(batch)
        relays = awaits_target and self.index > 0 and not any(locks) and plan.targets != "bootstrap"
        at_once = self.last or locks.mine or plan.targets == "bootstrap"
        sends = locks.below or (updates and in_turn and at_once) if plan.unlocked else mode.gradient == "true"
        samples = plan.unlocked and plan.quality_every is not None and (batch + 1) % plan.quality_every == 0
        return Route(
            locked=locks.mine,
            updates=updates,
            sends_now=self.index > 0 and sends,
            awaited=mode.gradient == "true" or locks.below,
            wants_target=in_turn if locks.mine else awaits_target,
            relays=relays,
            samples=samples,
            stashes=relays or ((mode.stashes or samples) and not self.last),
            from_true=mode.gradient == "true" or (locks.mine and below_the_loss),
        )

    def warm_up(self, batch: int) -> Locks:
        """Who waits while all cuts are locked, since the run has only begun; nobody after it."""
        locked = self.plan.unlocked and batch < self.plan.warmup_steps
        return Locks(mine=locked and not self.last, below=locked and self.index > 0)

    def updates(self, batch: int) -> bool:
        """Whether this stage updates from this batch: drawn from (seed, stage, batch)."""
        p = self.plan.update_probability
        return p >= 1 or derived_seed(self.plan.seed, "update", self.index, batch) < p * 2**63
