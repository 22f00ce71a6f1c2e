"""Arithmetic on spans: from what the workers did when, to throughput, shares, latencies and ages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.metrics.spans import WAITING, Span, Spans

__all__ = ["GROUPS", "Measured", "StageMeasured", "measure"]

GROUPS: dict[str, tuple[Span, ...]] = {
    "forward": (Span.FORWARD,),
    "backward": (Span.BACKWARD, Span.STEP),
    "dni": (Span.DNI, Span.DNI_TRAIN),
    "relay": (Span.RELAY,),
    "communication": (Span.SEND, Span.RECEIVE, Span.AVERAGE),
    "load": (Span.LOAD,),
    "evaluate": (Span.EVALUATE,),
    "waiting": WAITING,
    "other": (Span.OTHER, Span.QUALITY),
}
"""What the spans are for: the lines of every report."""


@dataclass(frozen=True)
class StageMeasured:
    """One stage over the window that counts.

    Latencies and ages are counted from the end of a batch's forward to the end of its update, and to the arrival of its
    true gradient. The queue is that of activations when a forward begins, with what an emulated link has on its way.
    """

    shares: dict[str, float]  # what the wall time went into, by group; adds up to 1
    update_latency_s: tuple[float, float] | None  # p50, p99
    gradient_age_updates: tuple[float, float] | None  # p50, max; None where no gradient comes late
    gradient_age_s: tuple[float, float] | None  # p50, max
    queue_depth: tuple[float, float] | None  # p50, max, in messages; None for the first stage
    records: int  # spans
    sent_bytes: tuple[float, float] | None = None  # down, up, for a training batch of the whole run; None: not counted

    @property
    def busy(self) -> float:
        """Share of the time in which it did not wait."""
        return 1.0 - self.shares["waiting"]


@dataclass(frozen=True)
class Measured:
    """One run."""

    batches: int  # for training, in the window
    seconds: float  # length of the window
    stages: tuple[StageMeasured, ...]  # those of further replicas come behind those of the first
    replicas: int = 1

    def samples_per_s(self, batch_rows: int) -> float:
        """Throughput."""
        return self.batches * batch_rows / self.seconds if self.seconds else float("nan")

    @property
    def queue_depth(self) -> dict[str, list[float | None]]:
        """Median and max depth of the activation queues, one entry per stage, as the JSON files have it."""
        depths = [stage.queue_depth or (None, None) for stage in self.stages]
        return {"median": [depth[0] for depth in depths], "max": [depth[1] for depth in depths]}

    @property
    def bytes_moved(self) -> dict[str, list[float]] | None:
        """What every stage sends down and up: bytes per batch, 1e6 bytes per second of the window; None: unknown."""
        sent = [stage.sent_bytes for stage in self.stages if stage.sent_bytes is not None]
        if len(sent) < len(self.stages):
            return None
        per_s = self.batches / self.replicas / self.seconds * 1e-6 if self.seconds else float("nan")
        moved: dict[str, list[float]] = {}
        for way, each in zip(("down", "up"), zip(*sent, strict=True), strict=True):
            moved |= {f"{way}_bytes_per_batch": list(each), f"{way}_mb_per_s": [size * per_s for size in each]}
        return moved


def measure(
    stages: Sequence[Spans],
    warmup: int,
    sent_bytes: Sequence[tuple[int, int]] | None = None,
    window_ns: tuple[int, int] | None = None,
    replicas: int = 1,
) -> Measured:
    """Measure a run by the spans of every stage.

    The window reaches from the end of the last stage's step of batch ``warmup - 1`` to the end of its last step: in
    that time exactly the batches from ``warmup`` on came out of the pipeline. No stage is ahead by more than its queue.
    With replicas it reaches from the first such end to the last. ValueError: none of the batches counts.

    Args:
        warmup: batches that do not count, at least 1.
        sent_bytes: per stage, what it sent (down, up) over the whole run for training, in bytes.
        window_ns: the same two moments as the last stage took them itself, on the clock of the spans, so that these
            figures and its throughput are of one window; else a span may end with the report of its step's loss.
    """
    num_stages = len(stages) // replicas
    ends = [sorted(last.last_end(Span.STEP).values()) for last in stages[num_stages - 1 :: num_stages]]
    counts = list(map(len, ends))
    if min(counts) <= warmup or warmup < 1:
        raise ValueError(f"{min(counts)} batches and {warmup} of warm-up: at least one must count.")
    start_ns, end_ns = window_ns or (min(each[warmup - 1] for each in ends), max(each[-1] for each in ends))
    measured = []
    for index, spans in enumerate(stages):
        count = counts[index // num_stages]
        sent = (sent_bytes[index][0] / count, sent_bytes[index][1] / count) if sent_bytes else None
        measured.append(_stage(spans, spans.within(start_ns, end_ns), warmup, sent))
    return Measured(sum(counts) - replicas * warmup, (end_ns - start_ns) * 1e-9, tuple(measured), replicas)


def _stage(whole: Spans, window: Spans, warmup: int, sent: tuple[float, float] | None) -> StageMeasured:
    updates, seconds = whole.gradient_ages(first_batch=warmup)
    return StageMeasured(
        shares={name: window.share(*kinds) for name, kinds in GROUPS.items()},
        update_latency_s=_median_and(99, whole.update_latencies_s()[warmup:]),
        gradient_age_updates=_median_and(100, updates),
        gradient_age_s=_median_and(100, seconds),
        queue_depth=_median_and(100, window.queue[(window.span == Span.FORWARD) & (window.queue >= 0)]),
        records=len(window),
        sent_bytes=sent,
    )


def _median_and(percentile: int, values: Any) -> tuple[float, float] | None:
    return (float(np.percentile(values, 50)), float(np.percentile(values, percentile))) if len(values) else None
