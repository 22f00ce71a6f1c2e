"""Arithmetic on spans: from what the workers did when, to throughput, shares, latencies and ages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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

    Attributes:
        shares: what the wall time went into, by group; adds up to 1.
        update_latency_s: (p50, p99) seconds from the end of a forward to the end of its update.
        gradient_age_updates: (p50, max) updates between a batch's forward and the arrival of its true gradient; None
            where no gradient comes late.
        gradient_age_s: (p50, max) the same in seconds.
        queue_depth: (median, max) messages that wait in its activation queue when a forward begins; None for the first
            stage. What an emulated link has on its way waits there too.
        sent_bytes: (down, up) bytes of the tensors it sends for a training batch, a mean over the whole run; None where
            nobody counted.
        records: spans it recorded.
    """

    shares: dict[str, float]
    update_latency_s: tuple[float, float] | None
    gradient_age_updates: tuple[float, float] | None
    gradient_age_s: tuple[float, float] | None
    queue_depth: tuple[float, float] | None
    records: int
    sent_bytes: tuple[float, float] | None = None

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
        stages: one entry per stage; the stages of further replicas come behind those of the first.
        replicas: of the pipeline.
    """

    batches: int
    seconds: float
    stages: tuple[StageMeasured, ...]
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
        """What every stage sends down and up: bytes per batch, and 1e6 bytes per second of the window.

        None where nobody counted.
        """
        sent = [stage.sent_bytes for stage in self.stages if stage.sent_bytes is not None]
        if len(sent) < len(self.stages):
            return None
        per_s = self.batches / self.replicas / self.seconds * 1e-6 if self.seconds else float("nan")
        moved: dict[str, list[float]] = {}
        for way, each in zip(("down", "up"), zip(*sent, strict=True), strict=True):
            moved |= {f"{way}_bytes_per_batch": list(each), f"{way}_mb_per_s": [size * per_s for size in each]}
        return moved

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def measure(
    stages: Sequence[Spans],
    warmup: int,
    sent_bytes: Sequence[tuple[int, int]] | None = None,
    window_ns: tuple[int, int] | None = None,
    replicas: int = 1,
) -> Measured:
    """Measure a run.

    The window reaches from the end of the last stage's step of batch ``warmup - 1`` to the end of its last step: in
    that time exactly the batches from ``warmup`` on came out of the pipeline. No stage is ahead by more than its queue.
    With replicas it reaches from the first such end to the last.

    Args:
        stages: the spans of every stage.
        warmup: batches that do not count, at least 1.
        sent_bytes: per stage, what it sent (down, up) over the whole run for training, in bytes.
        window_ns: the same two moments as the last stage took them itself, on the clock of the spans, so that these
            figures and its throughput are of one window; None: the ends of the spans, in which the report of a step's
            loss may be as well.
        replicas: of the pipeline.

    Raises:
        ValueError: fewer than ``warmup`` + 1 batches.
    """
    num_stages = len(stages) // replicas
    ends = [sorted(last.last_end(Span.STEP).values()) for last in stages[num_stages - 1 :: num_stages]]
    counts = list(map(len, ends))
    if min(counts) <= warmup or warmup < 1:
        raise ValueError(f"{min(counts)} batches and {warmup} of warm-up: at least one must count.")
    start_ns, end_ns = window_ns or (min(each[warmup - 1] for each in ends), max(each[-1] for each in ends))
    sent = [
        (down / counts[index // num_stages], up / counts[index // num_stages])
        for index, (down, up) in enumerate(sent_bytes or ())
    ]
    return Measured(
        batches=sum(counts) - replicas * warmup,
        seconds=(end_ns - start_ns) * 1e-9,
        stages=tuple(
            _stage(spans, spans.within(start_ns, end_ns), warmup, sent[index] if sent else None)
            for index, spans in enumerate(stages)
        ),
        replicas=replicas,
    )


def _stage(whole: Spans, window: Spans, warmup: int, sent: tuple[float, float] | None) -> StageMeasured:
    updates, seconds = whole.gradient_ages(first_batch=warmup)
    latencies = whole.update_latencies_s()[warmup:]
    queue = window.queue[(window.span == Span.FORWARD) & (window.queue >= 0)]
    return StageMeasured(
        shares={name: window.share(*kinds) for name, kinds in GROUPS.items()},
        update_latency_s=(_at(latencies, 50), _at(latencies, 99)) if len(latencies) else None,
        gradient_age_updates=(_at(updates, 50), float(updates.max())) if len(updates) else None,
        gradient_age_s=(_at(seconds, 50), float(seconds.max())) if len(seconds) else None,
        queue_depth=(_at(queue, 50), float(queue.max())) if len(queue) else None,
        sent_bytes=sent,
        records=len(window),
    )


def _at(values: Any, percentile: int) -> float:
    return float(np.percentile(values, percentile))
