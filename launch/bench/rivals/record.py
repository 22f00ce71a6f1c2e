"""What a rival measured, as a whole and in each of its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from pipeline.plan.goal import Reached

__all__ = ["Failed", "HeldOut", "RankRun", "RivalDied", "RivalRun", "Said", "merged"]


class HeldOut(msgspec.Struct, frozen=True):
    """One pass over the held-out batches.

    Attributes:
        loss: mean per row.
        accuracy: share of right answers, if the recipe counts them.
    """

    loss: float
    accuracy: float | None


class RankRun(msgspec.Struct, frozen=True, tag="finished"):
    """What one rank measured.

    Attributes:
        batches: training batches after the warm-up.
        seconds: how long they took this rank; all ranks start the clock behind one barrier.
        last_loss: training loss of the last batch (of this rank's rows of it), or None where the loss is not computed.
        held_out: the trained model on held-out data; rank 0 only, and only if the recipe has some.
        peak_memory_bytes: peak resident memory up to the end of the training.
        reached: when ``plan.until`` was met, by this rank's clock; None: never, or not asked for.
    """

    batches: int
    seconds: float
    last_loss: float | None
    held_out: HeldOut | None
    peak_memory_bytes: int
    reached: Reached | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """How a rank failed.

    Attributes:
        message: the error in a line.
        trace: its traceback.
    """

    message: str
    trace: str


class RivalDied(msgspec.Struct, frozen=True, tag="died"):
    """A rank's process ended without a word; ``how`` completes the sentence."""

    how: str


Said = RankRun | Failed | RivalDied
"""The last word of a rank."""


class RivalRun(msgspec.Struct, frozen=True):
    """What a rival measured.

    Attributes:
        batches: training batches after the warm-up.
        seconds: how long they took the slowest rank.
        loss: held-out loss, or the last training loss without held-out data.
        accuracy: held-out accuracy, if the recipe counts right answers.
        last_loss: training loss of the last batch.
        peak_memory_bytes: peak resident memory of every rank.
        reached: when ``plan.until`` was met, by the slowest clock; None: never, or not asked for.
    """

    batches: int
    seconds: float
    loss: float
    accuracy: float | None
    last_loss: float
    peak_memory_bytes: tuple[int, ...]
    reached: Reached | None = None


def merged(ranks: Sequence[RankRun]) -> RivalRun:
    """One record for all ranks: the slowest clock, the mean of the losses."""
    losses = [run.last_loss for run in ranks if run.last_loss is not None]
    last_loss, held_out = sum(losses) / len(losses), ranks[0].held_out
    reached = [run.reached for run in ranks if run.reached is not None]
    return RivalRun(
        batches=ranks[0].batches,
        seconds=max(run.seconds for run in ranks),
        loss=held_out.loss if held_out else last_loss,
        accuracy=held_out.accuracy if held_out else None,
        last_loss=last_loss,
        peak_memory_bytes=tuple(run.peak_memory_bytes for run in ranks),
        reached=replace(reached[0], seconds=max(one.seconds for one in reached)) if reached else None,
    )
