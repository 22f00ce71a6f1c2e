"""Which gradients flow to the stage below, and when: the `targets` of the plan.

    bootstrap   J^T s at the update          the synthetic gradient, taken through the stage; the loss only reaches
                                             the last DNI (Jaderberg et al. 2017, section 2.2)
    true        J^T g when g comes
    mixed       J^T (lambda g + (1-lambda) s) when g comes

Targets flow for one batch in `dni.every`, and only for these is anything computed or sent.

The last stage has the true gradient at its update; in modes that work with true gradients every stage has. In the mode
`local` nothing flows. A stage that makes no update from a batch (``update_probability``) sends down nothing of its own.
A stage below that is locked (``pipeline.stage.unlock``) gets what this one updates with, of every batch; nothing later.

All of it is decided when a batch comes in, and kept with the batch: its ``Route``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.plan.plan import Plan
from pipeline.schedule.modes import MODES, Mode
from pipeline.seeding import derived_seed

__all__ = ["FREE", "Flow", "Locks", "Route"]


class Locks(NamedTuple):
    """Who waits for the gradient of a batch, in a mode that updates from synthetic ones.

    Attributes:
        mine: this stage waits for that from above.
        below: the stage below waits for that from this one.
    """

    mine: bool = False
    below: bool = False


FREE = Locks()
"""Nobody waits."""


class Route(NamedTuple):
    """What a stage does with one batch, decided when it comes in.

    Attributes:
        locks: who waits for its gradient.
        updates: the stage updates from it.
        sends_now: the input gradient found at its update is sent down there and then.
        awaited: the stage below waits for that one; else it is a target, which may be dropped.
        wants_target: the stage's DNI learns from the gradient that comes for it.
        relays: the true gradient will be taken through the stage after the update.
        samples: its true gradient travels all the way down, to see how good the synthetic ones were.
        stashes: the weights will change between its forward and the last backward through it.
        from_true: a stage below the last one updates with the gradient of the loss, not with one that a DNI had a part
            in.
    """

    locks: Locks
    updates: bool
    sends_now: bool
    awaited: bool
    wants_target: bool
    relays: bool
    samples: bool
    stashes: bool
    from_true: bool

    @property
    def locked(self) -> bool:
        """The stage waits for the gradient from above."""
        return self.locks.mine


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
    def mode(self) -> Mode:
        """The plan's mode."""
        return MODES[self.plan.mode]

    @property
    def true_targets(self) -> bool:
        """Whether what this stage's DNI learns from is the gradient of the loss, not (partly) of another DNI."""
        return self.plan.targets == "true" or self.index == self.plan.stages - 2

    @property
    def window_suffices(self) -> bool:
        """Whether the stage below only trains its DNI on what it gets from this one, and passes nothing on."""
        return self.plan.unlocked and (self.index == 1 or self.plan.targets == "bootstrap")

    def route(self, batch: int, locks: Locks = FREE) -> Route:
        """What is done with a batch that comes in while these wait."""
        updates, relays, samples = self.updates(batch), self.relays(batch, locks), self._samples(batch)
        below_the_loss = locks.mine and self.index == self.plan.stages - 2
        return Route(
            locks=locks,
            updates=updates,
            sends_now=self._at_update(batch, locks, updates),
            awaited=self.mode.gradient == "true" or locks.below,
            wants_target=self._in_turn(batch) if locks.mine else self._waits_for_target(batch),
            relays=relays,
            samples=samples,
            stashes=relays or ((self.mode.stashes or samples) and not self.last),
            from_true=self.mode.gradient == "true" or below_the_loss,
        )

    def warm_up(self, batch: int) -> Locks:
        """Who waits while all cuts are locked, since the run has only begun; nobody after it."""
        locked = self.plan.unlocked and batch < self.plan.warmup_steps
        return Locks(mine=locked and not self.last, below=locked and self.index > 0)

    def updates(self, batch: int) -> bool:
        """Whether this stage updates from this batch: drawn from (seed, stage, batch)."""
        p = self.plan.update_probability
        return p >= 1 or derived_seed(self.plan.seed, "update", self.index, batch) < p * 2**63

    def relays(self, batch: int, locks: Locks = FREE) -> bool:
        """Whether the true gradient of this batch will be taken through this stage after its update."""
        between = self.index > 0 and not self.last and not any(locks)
        return between and self.plan.unlocked and self.plan.targets != "bootstrap" and self._flows(batch)

    # ------------------------------------------------------------------ private

    def _at_update(self, batch: int, locks: Locks, updates: bool) -> bool:
        if self.index == 0:
            return False
        if self.mode.gradient != "synthetic":
            return self.mode.gradient == "true"
        at_once = self.last or locks.mine or self.plan.targets == "bootstrap"
        return locks.below or (updates and self._in_turn(batch) and at_once)

    def _waits_for_target(self, batch: int) -> bool:
        return self.plan.unlocked and not self.last and self._flows(batch)

    def _samples(self, batch: int) -> bool:
        every = self.plan.quality_every
        return self.plan.unlocked and every is not None and (batch + 1) % every == 0

    def _flows(self, batch: int) -> bool:
        """Whether a gradient for this batch sets out towards this stage: from the stage above, or from the last one."""
        origin = self.index + 1 if self.plan.targets == "bootstrap" else self.plan.stages - 1
        return self._in_turn(batch) and Flow(self.plan, origin).updates(batch)

    def _in_turn(self, batch: int) -> bool:
        return batch % (self.plan.dni.every or 1) == 0
