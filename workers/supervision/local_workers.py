"""The driver's side: start the workers of a run, listen to them, and end them all, whatever happens.

with LocalWorkers(...) as crew:          starts the processes; ends and reaps them on the way out
    for record in crew.run():    yields what they report; raises RunFailed for the first real failure
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection as mp_connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

from workers import errors
from workers.channels.wakeup import WakeUp
from workers.processes.context import NO_STATUS, end_of_fork_server, listener, process_context
from workers.processes.interrupts import Interrupts
from workers.supervision.stall import Progress
from workers.telemetry import records
from workers.telemetry.status_table import StatusTable
from workers.wiring.run_memory import unlink_all
from workers.worker.assignment import Assignment
from workers.worker.main import worker_main

__all__ = ["LocalWorkers"]

_LOOK_EVERY_S = 0.2
_GRACE_S = 2.0


class LocalWorkers:
    """The workers of one run.

    Args:
        assignments: one per worker, in the order of their numbers.
        board: the run's status board.
        start_within_s: how long building and attaching may take.
    """

    def __init__(self, assignments: Sequence[Assignment], board: StatusTable, start_within_s: float = 120.0) -> None:
        self._assignments, self._board, self._start_within_s = assignments, board, start_within_s
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._bells: list[WakeUp] = []
        self._interrupts = Interrupts()

    @property
    def pids(self) -> list[int]:
        """Process ids, by worker."""
        return [process.pid or 0 for process in self._processes]

    def __enter__(self) -> Self:
        context = process_context(type(self._assignments[0].source).__module__)
        self._interrupts.__enter__()
        try:
            socket = listener()
            for assignment in self._assignments:
                self._bells.append(WakeUp.attach(assignment.names.bell(assignment.worker), 1.0))
                mine, theirs = context.Pipe()
                process = context.Process(
                    target=worker_main,
                    args=(assignment, theirs, socket),
                    name=assignment.called.replace(", ", "-").replace(" ", "-"),
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(mine)
        except BaseException as failed:
            self.__exit__(type(failed), failed, failed.__traceback__)
            self._interrupts.raise_noted()  # what ended this process may have ended the fork server as well
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end()
        finally:
            self._interrupts.__exit__(kind, error, trace)

    def run(self) -> Iterator[records.Record]:
        """Start the training and yield what the workers report, until all have finished.

        Raises:
            errors.RunFailed: a worker reported a failure, died, did not start in time, or nobody made progress.
            KeyboardInterrupt: SIGINT (or SIGTERM, where it has a handler) came; at most 0.2 s later.

        Blocks:
            until something is reported; a stalled run ends after the plan's ``stall_after_s``.
        """
        yield from self._until(records.Ready, self._start_within_s)
        unlink_all(self._assignments[0].resolved, self._assignments[0].names)  # all have attached
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a worker that is gone is found by the next look
                records.send(pipe, records.Go())
        yield from self._until(records.Finished, self._assignments[0].plan.stall_after_s)

    def _until(self, last: type[records.Ready] | type[records.Finished], patience_s: float) -> Iterator[records.Record]:
        """Yield records until every worker has sent one of type ``last``."""
        awaited = set(range(len(self._pipes)))
        progress = Progress(self._board, self._assignments[0].plan, patience_s)
        while awaited:
            self._interrupts.raise_noted()
            dead = [k for k in awaited if self._processes[k].exitcode is not None]  # they have said all they will
            heard = self._hear(awaited)
            if any(isinstance(record, records.Failure) for _, record in heard):
                heard += self._drain(awaited)  # the cause was sent before its consequences, but maybe read after
                failed = [record for _, record in heard if isinstance(record, records.Failure)]
                raise errors.RunFailed.from_record(min(failed, key=lambda failure: failure.time_ns))
            for k, record in heard:
                if isinstance(record, last):
                    awaited.discard(k)
                yield record
            for k in awaited.intersection(dead):
                process = self._processes[k]
                status, who = self._board.read(k), self._assignments[k]
                died = process.pid or 0, process.exitcode or 0
                if process.exitcode == NO_STATUS and (why := end_of_fork_server()) is not None:
                    raise errors.RunFailed(why, stage=None)
                raise errors.killed(who.index, *died, status, name=who.called)
            if progress.stalled({k for k, _ in heard}, awaited):
                raise self._stall(patience_s)

    def _hear(self, workers: set[int]) -> list[tuple[int, records.Record]]:
        """What has been said, and by whom; waits a moment for something to happen."""
        watched = [item for k in workers for item in (self._pipes[k], self._processes[k].sentinel)]
        mp_connection.wait(watched, _LOOK_EVERY_S)
        return self._drain(workers)

    def _drain(self, workers: set[int]) -> list[tuple[int, records.Record]]:
        heard: list[tuple[int, records.Record]] = []
        for k in workers:
            with contextlib.suppress(EOFError, OSError):
                while self._pipes[k].poll():
                    heard.append((k, records.receive(self._pipes[k])))
        return heard

    def _stall(self, patience_s: float) -> errors.RunFailed:
        run_dir = self._assignments[0].run_dir
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)  # faulthandler writes the stacks
        plan = self._assignments[0].plan
        return errors.stalled(self._board, self.pids, patience_s, str(run_dir / "*stacks-*.txt"), plan)

    def _end(self) -> None:
        """Ask, wait a little, then kill: each worker's whole process group, grandchildren included."""
        self._board.stop()
        for bell in self._bells:
            bell.ring()
        deadline = time.monotonic() + _GRACE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            _kill_group(process)
        for process in self._processes:
            process.join(_GRACE_S)
            if process.exitcode is not None:  # else it is killed, and a busy machine has not got round to it
                process.close()
        for pipe in self._pipes:
            pipe.close()
        for bell in self._bells:
            bell.close()
        self._processes, self._pipes, self._bells = [], [], []


def _kill_group(process: BaseProcess) -> None:
    """End a worker and whatever it started; what is gone already is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    if process.is_alive():  # killed before it had a group of its own
        process.kill()
