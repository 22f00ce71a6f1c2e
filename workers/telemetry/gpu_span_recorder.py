"""Spans of a worker on a GPU: they say what the device did.

    host     | forward | dni | backward | step | wait ...        turns to the next thing as soon as it is queued
    device   ....| forward ....| dni ....| backward ....| step | (idle: wait)

Whenever the worker turns to something else, an event is recorded on the computing stream. A span begins when the device
has come to its event: when all that was queued before is done. An idle device is there when the host turns to it, so
that spans hold the waiting too and still add up to the wall time. RECEIVE is the time for which computing had to wait
for a copy; copies beside the computing take none.

Nothing waits for the device on the way, but once in 16,384 spans and at the end: then the device's clock is read
against the host's, and the times of the events since follow from it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.metrics.spans import Span
from workers.clock import now_ns
from workers.telemetry.span_recorder import FIELDS, START, SpanRecorder
from workers.telemetry.status_table import StatusTable

__all__ = ["CudaMarks", "GpuSpanRecorder"]


class CudaMarks:
    """Points in the work of a GPU's current stream, and when it came there."""

    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._events: list[torch.cuda.Event] = []
        self._count = 0

    def mark(self) -> None:
        """A point behind all that is queued; takes a microsecond or two."""
        if self._count == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[self._count].record(self._stream)
        self._count += 1

    def times_ns(self) -> list[int]:
        """When the GPU came to each point since the last call, on the common clock; waits for the last one.

        Exact to some microseconds: the host learns that late of the last point.
        """
        last = torch.cuda.Event(enable_timing=True)
        last.record(self._stream)
        last.synchronize()
        now = now_ns()
        times = [now - round(event.elapsed_time(last) * 1e6) for event in self._events[: self._count]]
        self._count = 0
        return times


class GpuSpanRecorder(SpanRecorder):
    """A ``SpanRecorder`` on the device's time; the board gets the host's."""

    def __init__(self, worker: int, board: StatusTable, path: Path, marks: CudaMarks) -> None:
        super().__init__(worker, board, path)
        self._marks, self._latest_ns = marks, 0

    def __call__(self, span: Span, batch: int) -> None:
        """From now on the worker does ``span`` with ``batch``."""
        self._marks.mark()
        super().__call__(span, batch)

    def _settle(self) -> None:
        try:
            times = self._marks.times_ns()
        except RuntimeError:
            return  # the device failed, which the worker reports; the host's times stand
        for index, time_ns in enumerate(times):
            self._latest_ns = max(self._latest_ns, time_ns)  # two readings of the clocks differ by microseconds
            self._block[index * FIELDS + START] = self._latest_ns
