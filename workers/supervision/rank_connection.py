"""The driver's connection to one rank's agent: what that said last, by whose clock, and where its files go.

agent  --records-->  drain: takes in statuses and files, puts times on the driver's clock  -->  the verdict
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from pipeline.errors import PlanError
from pipeline.metrics.spans import SPAN_DTYPE, Span
from workers.clock import now_ns
from workers.files import writing
from workers.supervision import control_records as control
from workers.supervision.control_socket import ControlSocket, Gone, wait_for
from workers.telemetry import records
from workers.telemetry.status_table import Status

__all__ = ["RankConnection"]

_CLOCK_ROUNDS = 8
_ANSWER_WITHIN_S = 30.0

_Record = TypeVar("_Record", bound=control.Control)


@dataclass
class RankConnection:
    """One agent."""

    wire: ControlSocket
    hello: control.Hello = field(default_factory=lambda: control.Hello(-1, 0, "?", "", ""))
    offset_ns: int = 0  # its clock minus the driver's
    status: Status = field(default_factory=lambda: Status(Span.OTHER, -1, now_ns(), 0))  # on the driver's clock
    state: str = ""  # the letter of its worker's process
    pid: int = 0  # of its worker, once that is ready
    gone: str | None = None  # why nothing comes from it any more
    words: set[type] = field(default_factory=set)  # the types of the records it has sent
    files: Mapping[str, Path] = field(default_factory=dict)  # where what its worker writes is to lie

    @property
    def quiet(self) -> bool:
        """Whether no more is to be expected of it after an interrupt."""
        last_words = {control.Interrupted, control.WorkerDied, records.Failure}
        return self.gone is not None or not self.words.isdisjoint(last_words)

    def tell(self, record: control.Control) -> None:
        """Send it a record, if it can be reached; if not, that is noted. Does not block."""
        if self.gone is None:
            try:
                self.wire.send(record)
            except Gone as gone:
                self.gone = str(gone)

    def drain(self) -> list[control.Control]:
        """What it has said since the last look, times on the driver's clock. Does not block."""
        heard: list[control.Control] = []
        if self.gone is None:
            try:
                heard = self.wire.drain()
            except (Gone, msgspec.DecodeError) as gone:
                self.gone = str(gone)
        self.words.update(map(type, heard))
        return [self._taken(record) for record in heard]

    def answer(self, kind: type[_Record], asked: Callable[[], bool]) -> _Record:
        """The next record of a kind from it, before anything else runs; blocks 30 s at most.

        Raises PlanError where it is gone or does not answer, KeyboardInterrupt where this process was asked to end.
        """
        end = time.monotonic() + _ANSWER_WITHIN_S
        while time.monotonic() < end and self.gone is None:
            if asked():
                raise KeyboardInterrupt
            wait_for(self.wire)
            for record in self.drain():
                if isinstance(record, kind):
                    return record
        raise PlanError(
            f"rank {self.hello.rank} ({self.hello.host}) {self.gone or 'does not answer'}: look at what it "
            "printed on its host."
        )

    def compare_clocks(self, asked: Callable[[], bool]) -> None:
        """Find its clock minus ours, from the quickest of eight answers: right to half of what that one took.

        Raises and blocks as ``answer``, eight times.
        """
        offsets: dict[int, int] = {}
        for _ in range(_CLOCK_ROUNDS):
            before_ns = now_ns()
            self.tell(control.ReadClock())
            answer = self.answer(control.Time, asked)
            after_ns = now_ns()
            offsets[after_ns - before_ns] = answer.time_ns - (before_ns + after_ns) // 2
        self.offset_ns = offsets[min(offsets)]

    def _taken(self, record: control.Control) -> control.Control:
        """Note what is for the driver's eyes, and turn times into the driver's own."""
        if isinstance(record, control.WorkerStatus):
            start_ns = record.start_ns - self.offset_ns if record.start_ns else self.status.start_ns
            self.status = Status(Span(record.span), record.batch, start_ns, record.progress)
            self.state = record.state
        elif isinstance(record, control.File):
            self._write(record)
        elif isinstance(record, records.Ready):
            self.pid = record.pid
        elif isinstance(record, records.Observation | records.Failure):
            return msgspec.structs.replace(record, time_ns=record.time_ns - self.offset_ns)
        elif isinstance(record, records.Finished):
            late = self.offset_ns
            window = record.window_ns and (record.window_ns[0] - late, record.window_ns[1] - late)
            times = {"begin_ns": record.begin_ns - late, "end_ns": record.end_ns - late, "window_ns": window}
            return msgspec.structs.replace(record, **times)
        return record

    def _write(self, piece: control.File) -> None:
        path = self.files[piece.what]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(piece.data)
        if piece.last and piece.what == "spans" and self.offset_ns:
            spans = np.load(path, allow_pickle=False)
            assert spans.dtype == SPAN_DTYPE, "spans come from a worker of this version"
            spans["start_ns"] -= self.offset_ns
            with writing(path):
                np.save(path, spans, allow_pickle=False)
