"""A rank's part in a run of many ranks: start one worker, pass on what it says, end it whatever happens.

    driver  <--wire-->  agent  <--pipe-->  worker        the worker is the same as in a run on one host
                          |---- board, bell ----|

The agent computes nothing. When it dies, its worker notices and ends; when its worker dies, it tells the driver.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import connection as mp_connection
from pathlib import Path
from typing import Any, cast

from pipeline.errors import PlanError
from pipeline.wording import said, shortened, text_of, traceback_of
from workers.clock import now_ns
from workers.processes.context import forget_fork_server
from workers.supervision import protocol
from workers.supervision.protocol import ControlSocket
from workers.supervision.rank_worker import RankWorker
from workers.telemetry import records
from workers.wiring.run_memory import shared_memory, unlink_all
from workers.worker.assignment import FILES, Assignment
from workers.worker.unnamed_file import UnnamedFile

__all__ = ["DriverGone", "farewell", "serve"]

_LOOK_EVERY_S = 0.2
_STATUS_EVERY_NS = 500_000_000
_TASK_WITHIN_S = 900.0  # the driver may be measuring layers, or waiting for the last rank
_STOP_WITHIN_S = 8.0  # torchrun kills what is there 30 s after its SIGTERM


class DriverGone(ConnectionError):
    """The driver hung up, or said nothing for too long, before the run was over.

    Args:
        why: what was seen.
        told: whether the run had begun here; else the driver has said on its own console what was wrong.
    """

    def __init__(self, why: str, told: bool) -> None:
        super().__init__(f"the driver (rank 0) is gone ({why}); the worker of this rank was stopped")
        self.told = told


class _Stop(Exception):
    """The driver ends the run."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def serve(
    wire: ControlSocket,
    hello: protocol.Hello,
    prepare: Callable[[protocol.Task], Assignment],
    asked: Callable[[], bool],
    observe: Callable[[protocol.WorkerStatus], None] | None = None,
    last: bool = True,
) -> int:
    """Take part in one run.

    Args:
        wire: to the driver.
        hello: who this is.
        prepare: makes the worker's assignment from the task; what it raises goes to the driver, who reports it.
        asked: whether somebody asked this process to end (SIGINT, SIGTERM).
        observe: gets what the worker does, twice a second, before the driver does.
        last: whether this process starts no other worker after this run.

    Returns:
        the exit status that the driver gave.

    Raises:
        DriverGone: no more word from the driver.

    Blocks:
        until the driver stops the run or is gone; 900 s for the task.
    """
    agent = _Agent(wire, hello, asked, observe or _nobody, last)
    try:
        try:
            agent.run(prepare)
        except (_Stop, protocol.Gone):
            raise
        except Exception as error:
            agent.fail(error)
    except _Stop as stop:
        agent.end()
        return farewell(wire, stop.status)
    except protocol.Gone as gone:
        raise DriverGone(str(gone), agent.started) from gone
    finally:
        agent.end()
    raise AssertionError("an agent ends when it is told to")


def farewell(wire: ControlSocket, status: int) -> int:
    """Say that all is cleaned up, and wait until the driver, who has the word, hangs up; at most 8 s.

    Returns:
        ``status``.
    """
    end = time.monotonic() + _STOP_WITHIN_S
    with contextlib.suppress(protocol.Gone):
        wire.send(protocol.AgentStopped())
        while time.monotonic() < end:
            mp_connection.wait(cast(Any, [wire]), _LOOK_EVERY_S)
            while wire.poll():
                wire.receive()
    return status


class _Agent:
    def __init__(
        self,
        wire: ControlSocket,
        hello: protocol.Hello,
        asked: Callable[[], bool],
        observe: Callable[[protocol.WorkerStatus], None],
        last: bool,
    ) -> None:
        self.started = False
        self._last = last
        self._wire, self._hello, self._asked, self._observe = wire, hello, asked, observe
        self._interrupted_at: float | None = None
        self._worker: RankWorker | None = None
        self._stack = contextlib.ExitStack()

    def run(self, prepare: Callable[[protocol.Task], Assignment]) -> None:
        """The whole life; ends with an exception."""
        self._wire.send(self._hello)
        task = cast(protocol.Task, self._await(protocol.Task))
        try:
            assignment = prepare(task)
            mine = task.hosts[assignment.worker]
            here = [worker for worker, host in enumerate(task.hosts) if host == mine]
            if task.makes_memory:
                self._stack.enter_context(shared_memory(assignment.resolved, assignment.names, here))
        except PlanError as error:
            self._wire.send(protocol.Prepared([shortened(problem) for problem in error.problems]))
            self._await(protocol.Start)  # what comes is Stop
        self._wire.send(protocol.Prepared())
        start = cast(protocol.Start, self._await(protocol.Start))
        self.started = True
        if start.run_dir is None:
            unnamed = {what: self._stack.enter_context(contextlib.closing(UnnamedFile())) for what in FILES}
            assignment = replace(assignment, unnamed=unnamed)
        else:
            assignment = replace(assignment, run_dir=Path(start.run_dir))
        self._worker = RankWorker(assignment)
        self._worker.start()
        if self._last:  # now, while everybody is there: this process and its worker may be killed together
            forget_fork_server()
        self._supervise(self._worker, task.makes_memory)

    def fail(self, error: Exception) -> None:
        """Something went wrong here and not in the worker: the driver has to hear of it. Waits for the stop."""
        rank = self._hello.rank
        self._wire.send(
            records.Failure(
                stage=rank,
                pid=os.getpid(),
                message=f"stage {rank}: {text_of(error) if isinstance(error, PlanError) else said(error)}",
                traceback=traceback_of(error),
                time_ns=now_ns(),
            )
        )
        self._await(protocol.Start)

    def end(self) -> None:
        """End the worker and remove what this process made; a second call does nothing."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None
        self._stack.close()

    def _supervise(self, worker: RankWorker, makes_memory: bool) -> None:
        """Pass words on, both ways, until the driver has heard enough."""
        told_ns, last_heard = 0, time.monotonic()
        patience_s = 2 * worker.assignment.plan.stall_after_s
        while True:
            mp_connection.wait(cast(Any, [self._wire, *worker.watched]), _LOOK_EVERY_S)
            for record in worker.said():
                self._wire.send(record)
            if now_ns() - told_ns > _STATUS_EVERY_NS:
                status = worker.status()
                self._observe(status)
                self._wire.send(status)
                told_ns = now_ns()
            heard = self._hear()
            for record in heard:
                self._obey(record, worker, makes_memory)
            if heard:
                last_heard = time.monotonic()
            elif time.monotonic() - last_heard > patience_s:
                raise protocol.Gone(f"no word from it for {patience_s:.0f} s")

    def _obey(self, record: protocol.Control, worker: RankWorker, makes_memory: bool) -> None:
        if isinstance(record, records.Go):
            if makes_memory:  # all have attached
                unlink_all(worker.assignment.resolved, worker.assignment.names)
            worker.go()
        elif isinstance(record, protocol.Enough):
            worker.board.end_early()
        elif isinstance(record, protocol.Dump):
            for piece in worker.stacks():
                self._wire.send(piece)

    def _await(self, kind: type) -> protocol.Control:
        """The next record of a kind."""
        end = time.monotonic() + _TASK_WITHIN_S
        while time.monotonic() < end:
            mp_connection.wait(cast(Any, [self._wire]), _LOOK_EVERY_S)
            for record in self._hear():
                if isinstance(record, kind):
                    return record
        raise protocol.Gone(f"no {kind.__name__} from it within {_TASK_WITHIN_S:.0f} s")

    def _hear(self) -> list[protocol.Control]:
        """What the driver says; answers what can be answered here, and says that this process was asked to end."""
        heard: list[protocol.Control] = []
        while self._wire.poll():
            record = self._wire.receive()
            if isinstance(record, protocol.Stop):
                raise _Stop(record.status)
            if isinstance(record, protocol.ReadClock):
                self._wire.send(protocol.Time(now_ns()))
            heard.append(record)
        if self._asked():
            if self._interrupted_at is None:
                self._interrupted_at = time.monotonic()
                self._wire.send(protocol.Interrupted())
            elif time.monotonic() - self._interrupted_at > _STOP_WITHIN_S:
                raise protocol.Gone(f"no answer to an interrupt within {_STOP_WITHIN_S:.0f} s")
        return heard


def _nobody(status: protocol.WorkerStatus) -> None:
    """Nobody here wants to know."""
