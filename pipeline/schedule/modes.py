"""The modes: who may update when, and from what. Everything that tells one mode from another is in this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.schedule import policies
from pipeline.schedule.policies import Policy

__all__ = ["MODES", "Mode"]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One mode of training.

    Attributes:
        gradient: what a stage below the last one updates from: the true gradient, a synthetic one from its DNI, or that
            of a loss of its own.
        exact: equals single-process training over the same microbatches.
        cuts_batches: works on microbatches.
        timed: what is learned depends on when messages arrive; else their order alone decides, whatever the delays.
        stashes: several batches are open at once while weights change: the backward pass needs the weights of its
            forward pass.
        averages: what the replicas of a stage average (``pipeline.replicas.averaging``): the gradients before every
            step, or the weights now and then.
        says: for the user.
    """

    policy: Policy
    gradient: Literal["true", "synthetic", "local"] = "true"
    exact: bool = True
    cuts_batches: bool = False
    timed: bool = False
    stashes: bool = False
    averages: Literal["gradients", "weights"] = "gradients"
    says: str


MODES: dict[str, Mode] = {
    "naive": Mode(policy=policies.naive, says="locked, one batch in the pipeline at a time"),
    "gpipe": Mode(policy=policies.gpipe, cuts_batches=True, says="locked, microbatches: all forward, all backward"),
    "1f1b": Mode(policy=policies.one_f_one_b, cuts_batches=True, says="locked, microbatches, as few open as possible"),
    "async-1f1b": Mode(
        policy=policies.async_1f1b,
        exact=False,
        stashes=True,
        averages="weights",
        says="delayed true gradients on stashed weights",
    ),
    "local": Mode(
        policy=policies.unlocked,
        gradient="local",
        exact=False,
        averages="weights",
        says="every stage has a loss of its own, no gradients",
    ),
    "unlocked": Mode(
        policy=policies.unlocked,
        gradient="synthetic",
        exact=False,
        timed=True,
        averages="weights",
        says="updates at once from synthetic gradients",
    ),
}
"""Modes by name."""
