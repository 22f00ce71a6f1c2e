"""The worker process of one rank, as the rank's agent sees it: started, listened to, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

from workers.channels.wakeup import WakeUp
from workers.clock import now_ns
from workers.errors import process_state
from workers.processes.context import NO_STATUS, end_of_fork_server, listener, own_temporary_folder, process_context
from workers.supervision import protocol
from workers.telemetry import records
from workers.telemetry.status_table import StatusTable
from workers.worker.assignment import Assignment
from workers.worker.main import worker_main

__all__ = ["RankWorker", "start_fork_server"]

_GRACE_S = 2.0
_DUMP_WITHIN_S = 1.0
_LOOK_EVERY_S = 0.01
_PIECE_BYTES = 4 << 20
_RESULTS = ("spans", "model", "optimizer")


class RankWorker:
    """One worker process.

    Args:
        assignment: its part of the run; the board and the bells of its host are there. If it writes unnamed files,
            `said` and `stacks` give their content.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.assignment, self._sends_files = assignment, assignment.unnamed is not None
        self.board = StatusTable(assignment.names.board, assignment.plan.workers)
        self._bell = WakeUp.attach(assignment.names.bell(assignment.worker), 1.0)
        context = process_context(type(assignment.source).__module__, "workers.supervision.rank_worker")
        socket = start_fork_server()
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(
            target=_rank_worker, args=(assignment, self._theirs, socket), name=f"stage-{assignment.index}"
        )
        self._said_all = False

    def start(self) -> None:
        """Start the process."""
        self._process.start()
        self._theirs.close()

    @property
    def watched(self) -> list[object]:
        """What becomes ready when the worker speaks or dies; nothing once it has said its last word."""
        return [] if self._said_all else [self._pipe, self._process.sentinel]

    def said(self) -> Iterator[protocol.Control]:
        """What the worker said since the last look; its files come before its last word, its death is one."""
        dead = self._process.exitcode is not None  # then it has said all it will
        with contextlib.suppress(EOFError, OSError):
            while not self._said_all and self._pipe.poll():
                record = records.receive(self._pipe)
                self._said_all = isinstance(record, records.Finished | records.Failure)
                if isinstance(record, records.Finished) and self._sends_files:
                    for what in _RESULTS:
                        yield from _pieces(what, self.assignment.files[what])
                yield record
        if dead and not self._said_all:
            self._said_all = True
            pid, exit_code, assignment = self._process.pid or 0, self._process.exitcode or 0, self.assignment
            if exit_code == NO_STATUS and (why := end_of_fork_server()) is not None:
                yield records.Failure(assignment.index, pid, f"{assignment.called}: {why}", "", now_ns())
            else:
                yield protocol.WorkerDied(pid, exit_code)

    def status(self) -> protocol.WorkerStatus:
        """What the worker does now."""
        status = self.board.read(self.assignment.worker)
        state = process_state(self._process.pid or 0)
        return protocol.WorkerStatus(int(status.span), status.batch, status.start_ns, status.progress, state)

    def go(self) -> None:
        """Everybody is ready."""
        with contextlib.suppress(OSError):  # a worker that is gone is found by the next look
            records.send(self._pipe, records.Go())

    def stacks(self) -> Iterator[protocol.File]:
        """The stacks of the worker's threads, if it still writes them within a second."""
        path = self.assignment.files["stacks"]
        if self._process.pid is not None and self._process.exitcode is None and path.exists():
            os.kill(self._process.pid, signal.SIGUSR1)  # it has opened the file, so it handles the signal
            end = time.monotonic() + _DUMP_WITHIN_S
            while time.monotonic() < end and not path.stat().st_size:
                time.sleep(_LOOK_EVERY_S)
            if self._sends_files:
                yield from _pieces("stacks", path)

    def end(self) -> None:
        """Ask, wait a little, then kill: the whole process group, grandchildren included."""
        self.board.stop()
        self._bell.ring()
        if self._process.pid is not None:
            self._process.join(_GRACE_S)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            if self._process.is_alive():  # killed before it had a group of its own
                self._process.kill()
            self._process.join(_GRACE_S)
            if self._process.exitcode is not None:  # else it is killed, and a busy machine has not got round to it
                self._process.close()
        self._pipe.close()
        self._bell.close()
        self.board.close()


def _pieces(what: str, path: Path) -> Iterator[protocol.File]:
    """A file that the worker wrote; nothing of one that it had nothing to write into."""
    with path.open("rb") as file:
        data = file.read(_PIECE_BYTES)
        while data:
            data, piece = file.read(_PIECE_BYTES), data
            yield protocol.File(what, piece, last=not data)


def _rank_worker(assignment: Assignment, connection: Connection, socket: Path | None) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # inherited from the fork server, see below
    own_temporary_folder()
    worker_main(assignment, connection, socket)


def start_fork_server() -> Path | None:
    """torchrun ends a rank by SIGTERM to its process group. The fork server reaps the worker, so it has to outlive it.

    A signal mask is inherited, and unlike a handler it can be set in any thread.
    """
    resource_tracker.ensure_running()  # it would undo the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return listener()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
