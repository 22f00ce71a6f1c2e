"""What a rival measured, as a whole and in each of its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from pipeline.plan.goal import Reached

__all__ = ["Failed", "RankRun", "RivalRun", "Said", "merged"]


class RankRun(msgspec.Struct, frozen=True, tag="finished"):
    """What one rank measured.

    Attributes:
        batches: training batches after the warm-up.
        seconds: how long they took; all ranks start the clock behind one barrier.
        last_loss: training loss of the last batch (of this rank's rows of it), or None where the loss is not computed.
        held_out: (loss, accuracy) of the trained model on held-out data; rank 0 only, and only if the recipe has some.
        peak_memory_bytes: up to the end of the training: of the GPU, or resident.
        reached: when ``plan.until`` was met; None: never, or not asked for.
        forward_s: of the seconds, in forward passes; None where nobody knows.
        backward_s: of them, in the loss, the backward passes and the optimizer, as in the last stage of a pipeline.
    """

    batches: int
    seconds: float
    last_loss: float | None
    held_out: tuple[float, float | None] | None
    peak_memory_bytes: int
    reached: Reached | None = None
    forward_s: float | None = None
    backward_s: float | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """How a rank failed: the error in a line, or "was killed by SIGKILL" where its process died without a word."""

    message: str
    trace: str
    died: bool = False


Said = RankRun | Failed
"""The last word of a rank."""


class RivalRun(msgspec.Struct, frozen=True):
    """What the ranks of a rival measured together: see ``RankRun``; the slowest clock counts.

    Attributes:
        loss: held-out loss, or the last training loss without held-out data.
        accuracy: held-out accuracy, if the recipe counts right answers.
        peak_memory_bytes: of every rank.
        forward_s, backward_s: of one rank that trains alone.
    """

    batches: int
    seconds: float
    loss: float
    accuracy: float | None
    last_loss: float
    peak_memory_bytes: tuple[int, ...]
    reached: Reached | None
    forward_s: float | None
    backward_s: float | None


def merged(ranks: Sequence[RankRun]) -> RivalRun:
    """One record for all ranks: the slowest clock, the mean of the losses."""
    first = ranks[0]
    losses = [run.last_loss for run in ranks if run.last_loss is not None]
    last_loss = sum(losses) / len(losses)
    loss, accuracy = first.held_out or (last_loss, None)
    times = [run.reached for run in ranks if run.reached is not None]
    reached = replace(times[0], seconds=max(one.seconds for one in times)) if times else None
    seconds, peaks = max(run.seconds for run in ranks), tuple(run.peak_memory_bytes for run in ranks)
    spent = (first.forward_s, first.backward_s)
    return RivalRun(first.batches, seconds, loss, accuracy, last_loss, peaks, reached, *spent)
