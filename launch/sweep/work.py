"""Running points: each in the reference driver, in one of several processes with one thread each.

    driver  --(recipe, plan)-->  process 1   process 2 ...      as many as jobs; each takes point after point
            <--- Outcome ------

A process that dies, fails or takes too long loses its own point only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing import connection as mp_connection
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import msgspec
import torch

from launch.results.dni_quality import summarised
from launch.setup.recipe_source import NamedRecipe
from launch.sweep.grid import Point
from launch.sweep.points import CutQuality, Outcome, finite
from pipeline import Plan, StageError, run_reference
from pipeline.run.flops import count_flops
from pipeline.run.reference import Reference
from pipeline.wording import said, traceback_of
from workers.processes.context import process_context
from workers.processes.interrupts import Interrupts
from workers.telemetry.records import Judged

__all__ = ["Broken", "run_point", "run_points"]

_LOOK_S = 0.2  # between two looks for an interrupt or a run that takes too long


class Broken(msgspec.Struct, frozen=True, tag=True):
    """A point without an outcome: not a finding, something went wrong.

    Attributes:
        message: what.
        details: a traceback, or empty.
    """

    message: str
    details: str = ""


def run_point(source: NamedRecipe, plan: Plan) -> Outcome:
    """Train in this process, in the reference driver.

    A run that ended itself because its numbers were no longer finite, or ran away, is an outcome too.

    Raises:
        StageError: the work failed in another way.
    """
    start = time.perf_counter()
    recipe = source()
    try:
        result = run_reference(recipe, plan)
    except StageError as error:
        if not isinstance(error.__cause__, FloatingPointError):
            raise
        return Outcome(diverged=str(error), batches=error.batch or 0, seconds=time.perf_counter() - start)
    resolved = result.resolved
    tail = result.losses[-max(1, len(result.losses) // 10) :]
    train_loss = sum(tail) / len(tail)
    evaluations = tuple((updates, finite(scores.loss()), scores.accuracy()) for updates, scores in result.scores)
    _, loss, accuracy = evaluations[-1] if evaluations else (0, finite(train_loss), None)
    flops = count_flops(recipe, resolved.plan, resolved.cuts)
    return Outcome(
        loss=loss,
        accuracy=accuracy,
        train_loss=finite(train_loss),
        batches=len(result.losses),
        reached=result.reached,
        evaluations=evaluations,
        quality=_quality(result),
        flops=tuple(map(dataclasses.asdict, flops)),
        seconds=time.perf_counter() - start,
    )


def run_points(
    points: Sequence[Point], jobs: int, within_s: float
) -> Generator[tuple[Point, Outcome | Broken], None, None]:
    """Run points side by side.

    Args:
        points: in the order in which they begin.
        jobs: processes.
        within_s: seconds that a point may take.

    Yields:
        Every point with what it gave, in the order in which they end.

    Raises:
        KeyboardInterrupt: SIGINT (or SIGTERM, where it has a handler) came; at most 0.2 s later, or when the next
            point is asked for.

    Blocks:
        until the next one is over. No process is left when the iteration ends or is closed.
    """
    waiting, crew = deque(points), [_Process() for _ in range(min(jobs, len(points)))]
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        for each in crew:
            stack.callback(each.end)
        while waiting or any(each.point for each in crew):
            interrupts.raise_noted()
            for each in crew:
                if each.point is None and waiting:
                    each.take(waiting.popleft(), within_s)
            busy = [each.pipe for each in crew if each.point]
            ready = mp_connection.wait(busy, _LOOK_S)
            for each in crew:
                if each.point and (each.pipe in ready or time.monotonic() > each.deadline):
                    yield each.point, each.hear(within_s)
                    each.point = None


class _Process:
    """A process that runs one point at a time; started when it gets one, and anew after it died."""

    def __init__(self) -> None:
        self.point: Point | None = None
        self.deadline = 0.0
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    @property
    def pipe(self) -> Connection:
        """To the process."""
        assert self._pipe is not None, "it was given a point"
        return self._pipe

    def take(self, point: Point, within_s: float) -> None:
        """Begin a point."""
        if self._process is None:
            context = process_context(__name__)
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_main, args=(theirs,), name="sweep", daemon=True)
            try:
                self._process.start()
            finally:
                theirs.close()
        self.point, self.deadline = point, time.monotonic() + within_s
        with contextlib.suppress(BrokenPipeError):  # it died: that is heard next
            self.pipe.send((point.source, point.plan))

    def hear(self, within_s: float) -> Outcome | Broken:
        """What became of the point; a process that is dead, or too late, is ended."""
        process = self._process
        assert process is not None, "it was given a point"
        try:
            if self.pipe.poll():
                return msgspec.msgpack.decode(self.pipe.recv_bytes(), type=_Said).said
            how = f"did not end within {within_s:g} s: give it longer with --within-s"
        except (EOFError, ConnectionError):
            process.join(5.0)
            code = process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            how += "; look at the system's log for an out-of-memory kill"
        self.end()
        return Broken(f"the run (pid {process.pid}) {how}")

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join(5.0)
            self.pipe.close()
            self._process = None


class _Said(msgspec.Struct):
    said: Outcome | Broken


def _quality(result: Reference) -> tuple[CutQuality, ...]:
    judged = [
        Judged(stage, each.batch, each.cosine, each.norm_ratio, each.error, 0)
        for stage, found in result.qualities.items()
        for each in found
    ]
    found = (each.as_dict() for each in summarised(judged, len(result.losses)))
    return tuple(CutQuality(**{**each, "error": finite(each["error"])}) for each in found)


# ---------------------------------------------------------------- in a process


def _main(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends us
    _end_with_the_driver()
    torch.set_num_threads(1)
    while True:
        try:
            source, plan = connection.recv()
        except EOFError:
            return
        try:
            found: Outcome | Broken = run_point(source, plan)
        except Exception as error:
            found = Broken(said(error), traceback_of(error))
        connection.send_bytes(msgspec.msgpack.encode(_Said(found)))


def _end_with_the_driver() -> None:
    driver = parent_process()
    assert driver is not None, "a process of a sweep has a driver"

    def watch() -> None:
        mp_connection.wait([driver.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="driver-watch", daemon=True).start()
