"""A rank's part in a run of many ranks: start its worker, pass on what it says, end it whatever happens.

    driver  <--wire-->  agent  <--pipe-->  worker        the worker is the same as in a run on one host
                          |---- board, bell ----|

The agent computes nothing. When it dies, its worker notices and ends; when its worker dies, it tells the driver.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TypeVar

from pipeline.errors import PlanError
from pipeline.wording import said, shortened, text_of, traceback_of
from workers.clock import now_ns
from workers.supervision import control_records as control
from workers.supervision.control_socket import ControlSocket, Gone
from workers.supervision.driver_connection import DriverConnection, Stopped
from workers.supervision.local_workers import LocalWorkers
from workers.telemetry import records
from workers.wiring.run_memory import shared_memory
from workers.worker.assignment import FILES, Assignment
from workers.worker.unnamed_file import UnnamedFile

__all__ = ["serve"]

_STATUS_EVERY_NS = 500_000_000
_TASK_WITHIN_S = 900.0  # the driver may be measuring layers, or waiting for the last rank
_DUMP_WITHIN_S, _LOOK_FOR_STACKS_EVERY_S = 1.0, 0.05
_PIECE_BYTES = 4 << 20

_Record = TypeVar("_Record", bound=control.Control)


def serve(
    wire: ControlSocket,
    hello: control.Hello,
    prepare: Callable[[control.Task], Assignment],
    asked: Callable[[], bool],
    observe: Callable[[control.WorkerStatus], None] | None = None,
    last: bool = True,
) -> int:
    """Take part in one run, until the driver stops it; gives the exit status that the driver gave.

    Args:
        prepare: makes the worker's assignment from the task; what it raises goes to the driver, who reports it.
        asked: whether somebody asked this process to end (SIGINT, SIGTERM).
        observe: gets what the worker does, twice a second, before the driver does.
        last: whether this process starts no other worker after this run.

    Raises:
        DriverGone: no more word from the driver; for 900 s while there is no task.
    """
    agent = _Agent(DriverConnection(wire, asked), hello, observe or (lambda status: None), last)
    return agent.driver.take_part(lambda: agent.live(prepare), agent.stack.close)


@dataclass
class _Agent:
    driver: DriverConnection
    hello: control.Hello
    observe: Callable[[control.WorkerStatus], None]
    last: bool
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # ends the worker, removes what was made

    def live(self, prepare: Callable[[control.Task], Assignment]) -> NoReturn:
        """What goes wrong here and not in the worker is told to the driver, who then stops the run."""
        try:
            self._run(prepare)
        except (Stopped, Gone):
            raise
        except Exception as error:
            rank, what = self.hello.rank, text_of(error) if isinstance(error, PlanError) else said(error)
            message = f"stage {rank}: {what}"
            self.driver.send(records.Failure(rank, os.getpid(), message, traceback_of(error), now_ns()))
        self._await(control.Start)  # what comes is Stop
        raise AssertionError("the driver stops a run that cannot go on")

    def _run(self, prepare: Callable[[control.Task], Assignment]) -> None:
        """The whole life; comes back if the task cannot be done."""
        self.driver.send(self.hello)
        task = self._await(control.Task)
        try:
            assignment = prepare(task)
            mine = task.hosts[assignment.worker]
            here = [worker for worker, host in enumerate(task.hosts) if host == mine]
            if task.makes_memory:
                self.stack.enter_context(shared_memory(assignment.resolved, assignment.names, here))
        except PlanError as error:
            self.driver.send(control.Prepared([shortened(problem) for problem in error.problems]))
            return
        self.driver.send(control.Prepared())
        start = self._await(control.Start)
        self.driver.begun = True
        if start.run_dir is None:
            unnamed = {what: self.stack.enter_context(contextlib.closing(UnnamedFile())) for what in FILES}
            assignment = replace(assignment, unnamed=unnamed)
        else:
            assignment = replace(assignment, run_dir=Path(start.run_dir))
        # The driver has the verdict: an interrupt is told to it.
        workers = self.stack.enter_context(LocalWorkers([assignment], lambda: False, last=self.last))
        workers.start()
        self._pass_on(workers, assignment)

    def _pass_on(self, workers: LocalWorkers, assignment: Assignment) -> NoReturn:
        """Pass words on, both ways, until the driver has heard enough."""
        told_ns, patience_s = 0, 2 * assignment.plan.stall_after_s
        while True:
            told = self.driver.hear(patience_s, *workers.watched)
            said = [record for _, record in workers.said()]
            died = any(isinstance(record, control.WorkerDied) for record in said)
            if died or now_ns() - told_ns > _STATUS_EVERY_NS:  # where it was goes before that it died
                seen, (_, state) = workers.read(assignment.worker), workers.process(assignment.worker)
                status = control.WorkerStatus(int(seen.span), seen.batch, seen.start_ns, seen.progress, state)
                self.observe(status)
                self.driver.send(status)
                told_ns = now_ns()
            for record in said:
                if isinstance(record, records.Finished) and assignment.unnamed is not None:
                    for what in ("spans", "model", "optimizer"):
                        self._send_file(what, assignment)
                self.driver.send(record)
            for word in told:
                if isinstance(word, records.Go):
                    workers.go()
                elif isinstance(word, control.Enough):
                    workers.end_early()
                elif isinstance(word, control.Dump):
                    workers.dump()
                    if assignment.unnamed is not None:
                        _await_stacks(assignment.files["stacks"])
                        self._send_file("stacks", assignment)

    def _send_file(self, what: str, assignment: Assignment) -> None:
        """A file that the worker wrote, in pieces; nothing of one that it had nothing to write into."""
        with assignment.files[what].open("rb") as file:
            data = file.read(_PIECE_BYTES)
            while data:
                data, piece = file.read(_PIECE_BYTES), data
                self.driver.send(control.File(what, piece, last=not data))

    def _await(self, kind: type[_Record]) -> _Record:
        """The next record of a kind."""
        while True:
            for record in self.driver.hear(_TASK_WITHIN_S):
                if isinstance(record, kind):
                    return record


def _await_stacks(path: Path) -> None:
    """Until the file has grown and grows no more, or a second is over."""
    end, size = time.monotonic() + _DUMP_WITHIN_S, 0
    while time.monotonic() < end and (not size or path.stat().st_size > size):
        size = path.stat().st_size
        time.sleep(_LOOK_FOR_STACKS_EVERY_S)
