"""The modes: who may update when, and from what. Everything that tells one mode from another is in this table."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from pipeline.schedule.policies import Policy, async_1f1b, gpipe, naive, one_f_one_b, unlocked

__all__ = ["MODES", "Mode"]


@dataclass(frozen=True)
class Mode:
    """One mode of training."""

    policy: Policy  # says what a stage does next
    says: str  # to the user
    _: KW_ONLY
    gradient: Literal["true", "synthetic", "local"] = "true"  # what a stage updates from: of the loss, a DNI, its own
    exact: bool = True  # equals single-process training over the same microbatches
    cuts_batches: bool = False  # works on microbatches
    timed: bool = False  # what is learned depends on when messages arrive; else on their order alone
    stashes: bool = False  # weights change while batches are open, and backward passes need those of the forward
    averages: Literal["gradients", "weights"] = "gradients"  # of replicas: before every step, or now and then


MODES: dict[str, Mode] = {
    "naive": Mode(naive, "locked, one batch in the pipeline at a time"),
    "gpipe": Mode(gpipe, "locked, microbatches: all forward, all backward", cuts_batches=True),
    "1f1b": Mode(one_f_one_b, "locked, microbatches, as few open as possible", cuts_batches=True),
    "async-1f1b": Mode(
        async_1f1b, "delayed true gradients on stashed weights", exact=False, stashes=True, averages="weights"
    ),
    "local": Mode(
        unlocked, "every stage has a loss of its own, no gradients", gradient="local", exact=False, averages="weights"
    ),
    "unlocked": Mode(
        unlocked,
        "updates at once from synthetic gradients",
        gradient="synthetic",
        exact=False,
        timed=True,
        averages="weights",
    ),
}
"""Modes by name."""
