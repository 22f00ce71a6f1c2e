"""Arithmetic on spans: from what the workers did when, to throughput, shares, latencies and ages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.spans import Span, Spans

__all__ = ["GROUPS", "Measured", "StageMeasured", "measure", "warmup_of"]

GROUPS: dict[str, tuple[Span, ...]] = {
    "forward": (Span.FORWARD,),
    "backward": (Span.BACKWARD, Span.STEP),
    "dni": (Span.DNI, Span.DNI_TRAIN),
    "relay": (Span.RELAY,),
    "communication": (Span.SEND, Span.RECEIVE),
    "load": (Span.LOAD,),
    "evaluate": (Span.EVALUATE,),
    "waiting": (Span.WAIT,),
    "other": (Span.OTHER,),
}
"""What the spans are for: the lines of every report."""


@dataclass(frozen=True)
class StageMeasured:
    """One stage over the window that counts.

    Attributes:
        shares: what the wall time went into, by group; adds up to 1.
        update_latency_s: (p50, p99) seconds from the end of a forward to the end of its update.
        gradient_age_updates: (p50, max) updates between a batch's forward and the arrival of its true gradient; None
            where no gradient comes late.
        gradient_age_s: (p50, max) the same in seconds.
        queue: mean depth of its activation queue when a forward begins; None for the first stage.
        records: spans it recorded.
    """

    shares: dict[str, float]
    update_latency_s: tuple[float, float] | None
    gradient_age_updates: tuple[float, float] | None
    gradient_age_s: tuple[float, float] | None
    queue: float | None
    records: int

    @property
    def busy(self) -> float:
        """Share of the time in which it did not wait."""
        return 1.0 - self.shares["waiting"]


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        batches: training batches in the window.
        seconds: length of the window.
        stages: one entry per stage.
    """

    batches: int
    seconds: float
    stages: tuple[StageMeasured, ...]

    def samples_per_s(self, batch_rows: int) -> float:
        """Throughput."""
        return self.batches * batch_rows / self.seconds if self.seconds else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def warmup_of(steps: int) -> int:
    """Batches of a run that do not count: a tenth, at least one, never all."""
    return max(1, min(steps // 10, steps - 1))


def measure(stages: Sequence[Spans], warmup: int) -> Measured:
    """Measure a run.

    The window reaches from the end of the last stage's step of batch ``warmup - 1`` to the end of its last step: in
    that time exactly the batches from ``warmup`` on came out of the pipeline. No stage is ahead by more than its queue.

    Args:
        stages: the spans of every stage.
        warmup: batches that do not count, at least 1.

    Raises:
        ValueError: fewer than ``warmup`` + 1 batches.
    """
    ends = stages[-1].last_end(Span.STEP)
    if len(ends) <= warmup or warmup < 1:
        raise ValueError(f"{len(ends)} batches and {warmup} of warm-up: at least one must count.")
    batches = sorted(ends)
    start_ns, end_ns = ends[batches[warmup - 1]], ends[batches[-1]]
    return Measured(
        batches=len(batches) - warmup,
        seconds=(end_ns - start_ns) * 1e-9,
        stages=tuple(_stage(spans, spans.within(start_ns, end_ns), warmup) for spans in stages),
    )


def _stage(whole: Spans, window: Spans, warmup: int) -> StageMeasured:
    updates, seconds = whole.gradient_ages(first_batch=warmup)
    latencies = whole.update_latencies_s()[warmup:]
    queue = window.queue[(window.span == Span.FORWARD) & (window.queue >= 0)]
    return StageMeasured(
        shares={name: window.share(*kinds) for name, kinds in GROUPS.items()},
        update_latency_s=(_at(latencies, 50), _at(latencies, 99)) if len(latencies) else None,
        gradient_age_updates=(_at(updates, 50), float(updates.max())) if len(updates) else None,
        gradient_age_s=(_at(seconds, 50), float(seconds.max())) if len(seconds) else None,
        queue=float(queue.mean()) if len(queue) else None,
        records=len(window),
    )


def _at(values: Any, percentile: int) -> float:
    return float(np.percentile(values, percentile))
