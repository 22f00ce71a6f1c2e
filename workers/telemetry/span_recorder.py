"""Writes a worker's spans into memory that is there before the run begins, and its status onto the board."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.metrics.spans import SPAN_DTYPE, WAITING, Span
from workers.clock import now_ns
from workers.files import writing
from workers.telemetry.status_table import StatusTable

__all__ = ["FIELDS", "START", "Pulse", "SpanRecorder"]

_CHUNK = 1 << 14  # records per piece of memory: 512 KiB
FIELDS = len(SPAN_DTYPE.names or ())
"""Numbers in a record."""
START = 3
"""Which of them is the start."""
_TOLD = (Span.FORWARD, Span.BACKWARD, Span.DNI_TRAIN, Span.EVALUATE, *WAITING)
_NO_PROGRESS = (*WAITING, Span.OTHER)


class SpanRecorder:
    """A ``Recorder`` (see ``pipeline.metrics.spans``) with a clock. One call costs about a microsecond.

    Args:
        worker: number of the worker.
        board: where its status goes.

    Attributes:
        depth: gives the depth of the activation queue; looked at whenever a forward pass begins.
    """

    depth: Callable[[], int] | None = None

    def __init__(self, worker: int, board: StatusTable) -> None:
        self._worker, self._board = worker, board
        self._full: list[array[int]] = []
        self._chunk, self._position = _empty_chunk(), 0
        self._progress = 0

    def __call__(self, span: Span, batch: int) -> None:
        """From now on the worker does ``span`` with ``batch``."""
        start_ns = now_ns()
        chunk, position = self._chunk, self._position
        chunk[position] = span
        chunk[position + 1] = batch
        chunk[position + 2] = self.depth() if span is Span.FORWARD and self.depth is not None else -1
        chunk[position + 3] = start_ns
        self._position = position + FIELDS
        if span not in _NO_PROGRESS:
            self._progress += 1
        self._board.write(self._worker, span, batch, start_ns, self._progress)
        if self._position == len(chunk):
            self._settle()
            self._full.append(chunk)
            self._chunk, self._position = _empty_chunk(), 0

    def _settle(self) -> None:
        """Before the records in the present piece of memory are put away: their times become final."""

    def save(self, path: Path) -> None:
        """End the last span and write all records (SPAN_DTYPE) as a .npy file."""
        self(Span.OTHER, -1)
        self._settle()
        values = np.concatenate([*map(np.asarray, self._full), np.asarray(self._chunk)[: self._position]])
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                np.save(file, values.astype("<i8").view(SPAN_DTYPE), allow_pickle=False)


class Pulse:
    """A ``Recorder`` that keeps no spans (``Plan.spans`` off): for a run in which nothing is measured but its speed.

    It reads the clock and writes to the board only where a run that stalls could not be explained without: at the
    four actions of a stage and when it begins to wait. Every other call costs 0.1 us.

    Args:
        worker: number of the worker.
        board: where its status goes.
    """

    def __init__(self, worker: int, board: StatusTable) -> None:
        self._worker, self._board = worker, board
        self._progress = 0

    def __call__(self, span: Span, batch: int) -> None:
        """From now on the worker does ``span`` with ``batch``."""
        if span in _TOLD:
            self._progress += span not in WAITING
            self._board.write(self._worker, span, batch, now_ns(), self._progress)


def _empty_chunk() -> array[int]:
    return array("q", bytes(8 * FIELDS * _CHUNK))
