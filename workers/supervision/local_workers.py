"""Workers of this host, as children of this process: started, listened to, and ended, whatever happens.

    launcher on this host             LocalWorkers of all workers, and the verdict (`Supervisor.trained`)
    agent of a rank (`rank_agent`)    LocalWorkers of its own; the driver has the verdict

Every worker has a process group of its own, which is killed with all that it has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from workers.channels.wakeup import WakeUp
from workers.errors import RunFailed, process_state
from workers.processes import context
from workers.supervision import control_records as control
from workers.supervision.control_socket import wait_for
from workers.supervision.supervisor import Heard, Supervisor
from workers.telemetry import records
from workers.telemetry.status_table import Status, StatusTable
from workers.wiring.run_memory import unlink_all
from workers.worker.assignment import Assignment
from workers.worker.main import worker_main

__all__ = ["LocalWorkers"]

_GRACE_S = 2.0


@dataclass
class _Child:
    assignment: Assignment
    process: BaseProcess
    pipe: Connection
    silent: bool = False  # it has said its last word

    @property
    def pid(self) -> int:
        return self.process.pid or 0


class LocalWorkers(Supervisor):
    """Workers of this host, in the order of their numbers. Their shared memory is there.

    ``last``: this process starts no other workers afterwards. Then the fork server's socket is removed as soon as they
    run, as somebody may kill this process and them together.
    """

    def __init__(self, assignments: Sequence[Assignment], asked: Callable[[], bool], *, last: bool = False) -> None:
        super().__init__(asked)
        self._assignments, self._last, first = assignments, last, assignments[0]
        self.resolved, self.run_dir = first.resolved, first.run_dir
        self._board = StatusTable(first.names.board, first.plan.workers)
        self._bells = [WakeUp.attach(one.names.bell(one.worker), 1.0) for one in assignments]
        self._children: dict[int, _Child] = {}
        self._ended = False

    @property
    def workers(self) -> Sequence[int]:
        return [one.worker for one in self._assignments]

    @property
    def watched(self) -> list[Connection | int]:
        """What becomes ready when a worker speaks or dies; nothing of those that have said their last word."""
        speaking = [child for child in self._children.values() if not child.silent]
        return [item for child in speaking for item in (child.pipe, child.process.sentinel)]

    def start(self) -> None:
        """Start the processes, or raise RunFailed where the fork server is gone."""
        forking, socket = context.process_context(type(self._assignments[0].source).__module__), context.listener()
        for assignment in self._assignments:
            mine, theirs = forking.Pipe()
            name = assignment.called.replace(", ", "-").replace(" ", "-")
            process = forking.Process(target=worker_main, args=(assignment, theirs, socket), name=name)
            if self._last:
                context.has_own_temporary_folder(process)
            process.start()
            self._children[assignment.worker] = _Child(assignment, process, mine)
            theirs.close()
        if self._last:  # while all are there
            context.forget_fork_server()

    def run(self) -> Iterator[records.Record]:
        """Start the workers, then the training; see `Supervisor.trained`."""
        try:
            self.start()
        except RunFailed:
            self.raise_interrupt(())  # what ended the fork server may have asked this process to end
            raise
        yield from self.trained()

    def hear(self) -> list[Heard]:
        wait_for(*self.watched)
        return self.said()

    def said(self) -> list[Heard]:
        """As `hear`, without waiting."""
        heard: list[Heard] = []
        for worker, child in self._children.items():
            exit_code = child.process.exitcode  # once it is there, the worker has said all it will
            with contextlib.suppress(EOFError, OSError):
                while not child.silent and child.pipe.poll():
                    record = records.receive(child.pipe)
                    child.silent = isinstance(record, records.Finished | records.Failure)
                    heard.append((worker, record))
            if exit_code is not None and not child.silent:
                child.silent = True
                why = context.end_of_fork_server() if exit_code == context.NO_STATUS else None
                heard.append((worker, control.WorkerDied(child.pid, exit_code, why or "")))
        return heard

    def read(self, worker: int) -> Status:
        return self._board.read(worker)

    def process(self, worker: int) -> tuple[str, str]:
        pid = self._children[worker].pid
        return f"pid {pid}", process_state(pid)

    def go(self) -> None:
        assert self.resolved is not None
        unlink_all(self.resolved, self._assignments[0].names)  # all have attached
        for child in self._children.values():
            with contextlib.suppress(OSError):  # a worker that is gone is found by the next look
                records.send(child.pipe, records.Go())

    def end_early(self) -> None:
        self._board.end_early()

    def dump(self) -> None:
        for child in self._children.values():
            if child.process.exitcode is None and child.assignment.files["stacks"].exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGUSR1)  # it has opened the file, so it handles the signal

    def end(self, error: BaseException | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        processes = [child.process for child in self._children.values()]
        self._board.stop()
        for bell in self._bells:
            bell.ring()
        deadline = time.monotonic() + _GRACE_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            if process.is_alive():  # killed before it had a group of its own
                process.kill()
        for process in processes:
            process.join(_GRACE_S)
            if process.exitcode is not None:  # else it is killed, and a busy machine has not got round to it
                process.close()
        for child in self._children.values():
            child.pipe.close()
        for bell in self._bells:
            bell.close()
        self._board.close()
