"""What a worker was doing when: the one record from which every measurement comes.

A record (span, batch, start) means: from ``start`` on, until the next record, the worker did this. So the spans of a
worker add up to its wall time.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SPAN_DTYPE", "WAITING", "Recorder", "Span", "Spans", "silent"]


class Span(enum.IntEnum):
    """What a worker does."""

    OTHER = 0  # the loop itself: polling, deciding, bookkeeping
    WAIT = 1  # nothing to do: the bubble
    LOAD = 2  # making or fetching a batch of the data
    RECEIVE = 3  # taking a message out of a channel
    FORWARD = 4
    DNI = 5  # predicting the synthetic gradient
    BACKWARD = 6
    STEP = 7  # the optimizer
    SEND = 8  # putting a message into a channel
    DNI_TRAIN = 9
    RELAY = 10  # turning the true gradient at the output into the one at the input
    EVALUATE = 11
    QUALITY = 12  # comparing a synthetic gradient with the true one
    AVERAGE = 13  # giving the other replicas a share, and taking the average
    HELD = 14  # waiting for the other replicas' shares


WAITING = (Span.WAIT, Span.HELD)

SPAN_DTYPE = np.dtype([("span", "<i8"), ("batch", "<i8"), ("queue", "<i8"), ("start_ns", "<i8")])
"""One record: the span, the batch id or -1, the depth of the activation queue (-1: not looked at), and the start on the
common clock in nanoseconds."""

Recorder = Callable[[Span, int], None]
"""Called as ``record(span, batch)`` when a worker turns to something else."""


def silent(span: Span, batch: int) -> None:
    """A recorder that keeps nothing."""


class Spans:
    """The spans of one worker: records of SPAN_DTYPE in order of time; the last one only ends the one before it."""

    def __init__(self, records: npt.NDArray[Any]) -> None:
        self.span, self.batch, self.queue = (records[name][:-1] for name in ("span", "batch", "queue"))
        self.start_ns, self.end_ns = records["start_ns"][:-1], records["start_ns"][1:]

    def __len__(self) -> int:
        return len(self.span)

    def within(self, start_ns: int, end_ns: int) -> Spans:
        """The part of them inside a window; spans at its edges are cut."""
        inside = (self.end_ns > start_ns) & (self.start_ns < end_ns)
        part = object.__new__(Spans)
        part.span, part.batch, part.queue = self.span[inside], self.batch[inside], self.queue[inside]
        part.start_ns = np.maximum(self.start_ns[inside], start_ns)
        part.end_ns = np.minimum(self.end_ns[inside], end_ns)
        return part

    def seconds(self, *kinds: Span) -> float:
        """In spans of these kinds; none: of all."""
        mask = np.isin(self.span, kinds) if kinds else np.ones(len(self.span), bool)
        return float((self.end_ns[mask] - self.start_ns[mask]).sum()) * 1e-9

    def share(self, *kinds: Span) -> float:
        """Seconds in these kinds over the wall time of all spans; 0 when there is none."""
        return self.seconds(*kinds) / (self.seconds() or 1.0)

    def first_start(self, kind: Span) -> dict[int, int]:
        """Per batch: when its first span of this kind began, in ns."""
        mask = self.span == kind
        return dict(zip(self.batch[mask][::-1].tolist(), self.start_ns[mask][::-1].tolist(), strict=True))

    def last_end(self, kind: Span) -> dict[int, int]:
        """Per batch: when its last span of this kind ended, in ns."""
        mask = self.span == kind
        return dict(zip(self.batch[mask].tolist(), self.end_ns[mask].tolist(), strict=True))

    def update_latencies_s(self) -> npt.NDArray[np.float64]:
        """Per batch: seconds from the end of its forward to the end of its optimizer step."""
        forward, step = self.last_end(Span.FORWARD), self.last_end(Span.STEP)
        return np.array([(step[b] - forward[b]) * 1e-9 for b in sorted(step) if b in forward])

    def gradient_ages(self, first_batch: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Per batch whose true gradient arrived: updates made, and seconds passed, since the end of its forward.

        Arrival is the start of the span in which the stage trains its DNI on that gradient.
        """
        forward, learned = self.last_end(Span.FORWARD), self.first_start(Span.DNI_TRAIN)
        steps = np.sort(self.end_ns[self.span == Span.STEP])
        batches = [b for b in sorted(learned) if b in forward and b >= first_batch]
        begin = np.array([forward[b] for b in batches], dtype=np.int64)
        arrive = np.array([learned[b] for b in batches], dtype=np.int64)
        updates = np.searchsorted(steps, arrive, "right") - np.searchsorted(steps, begin, "right")
        return updates, (arrive - begin) * 1e-9
