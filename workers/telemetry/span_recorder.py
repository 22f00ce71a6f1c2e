"""Writes a worker's spans into memory that is there before the run begins, and its status onto the board.

    the worker fills       | block 0 .......... | block 1 .......... | block 0 ...
    a thread writes                             | block 0 ..|        | block 1 ..|        into the file, beside the work

So a run of any length takes two blocks of memory; the worker waits for the file only where that is slower than itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline.metrics.spans import SPAN_DTYPE, WAITING, Span
from workers.clock import now_ns
from workers.telemetry.span_file import SpanFile
from workers.telemetry.status_table import StatusTable

__all__ = ["FIELDS", "START", "Pulse", "SpanRecorder"]

_BLOCK = 1 << 14  # records per block: 512 KiB
FIELDS = len(SPAN_DTYPE.names or ())  # numbers in a record
START = 3  # which of them is the start
_TOLD = (Span.FORWARD, Span.BACKWARD, Span.DNI_TRAIN, Span.EVALUATE, *WAITING)
_NO_PROGRESS = (*WAITING, Span.OTHER)


class SpanRecorder:
    """A ``Recorder`` (see ``pipeline.metrics.spans``) with a clock. One call costs about a microsecond.

    Its status goes to ``board``; what is recorded lies from the end of each block on in the .npy file ``path``, of
    SPAN_DTYPE. Raises ``NotWritten`` where there can be no such file.
    """

    depth: Callable[[], int] | None = None
    """Gives the depth of the activation queue, whenever a forward pass begins."""

    def __init__(self, worker: int, board: StatusTable, path: Path) -> None:
        self._worker, self._board = worker, board
        self._file = SpanFile(path)
        self._writer = ThreadPoolExecutor(1, "spans")
        self._writing: Future[None] | None = None
        self._block, self._other = (array("q", bytes(8 * FIELDS * _BLOCK)) for _ in range(2))
        self._position = 0
        self._progress = 0

    def __call__(self, span: Span, batch: int) -> None:
        """From now on the worker does ``span`` with ``batch``."""
        start_ns = now_ns()
        block, position = self._block, self._position
        block[position] = span
        block[position + 1] = batch
        block[position + 2] = self.depth() if span is Span.FORWARD and self.depth is not None else -1
        block[position + START] = start_ns
        self._position = position + FIELDS
        if span not in _NO_PROGRESS:
            self._progress += 1
        self._board.write(self._worker, span, batch, start_ns, self._progress)
        if self._position == len(block):
            self._hand_over()

    def _settle(self) -> None:
        """Before the records in the present block are put away: their times become final."""

    def _hand_over(self) -> None:
        """Have the present block written, and go on with the other one, once that is written."""
        self._settle()
        if self._writing is not None:
            self._writing.result()
        self._writing = self._writer.submit(self._file.append, self._block, self._position)
        self._block, self._other, self._position = self._other, self._block, 0

    def close(self) -> None:
        """End the last span and write what is left; raises ``NotWritten`` where not all could be written."""
        self(Span.OTHER, -1)
        self._hand_over()
        self._writer.shutdown()
        self._file.close()


class Pulse:
    """A ``Recorder`` that keeps no spans (``Plan.spans`` off): for a run in which nothing is measured but its speed.

    It reads the clock and writes to the board only where a run that stalls could not be explained without: at the
    four actions of a stage and when it begins to wait. Every other call costs 0.1 us.
    """

    def __init__(self, worker: int, board: StatusTable) -> None:
        self._worker, self._board = worker, board
        self._progress = 0

    def __call__(self, span: Span, batch: int) -> None:
        """From now on the worker does ``span`` with ``batch``."""
        if span in _TOLD:
            self._progress += span not in WAITING
            self._board.write(self._worker, span, batch, now_ns(), self._progress)
