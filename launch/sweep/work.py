"""Running points: each in the reference driver, in one of several processes with one thread each.

    driver  --(recipe, plan)-->  process 1   process 2 ...      as many as jobs; each takes point after point
            <--- Outcome ------

A process that dies, fails or takes too long loses its own point only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing import connection as mp_connection
from multiprocessing.connection import Connection
from typing import Any, cast

import torch

from launch.bench.rivals.child import Child, ChildDied, ending
from launch.results.dni_quality import summarised
from launch.setup.recipe_source import NamedRecipe
from launch.sweep.grid import Point
from launch.sweep.points import Outcome
from pipeline import Plan, StageError, run_reference
from pipeline.run.flops import count_flops
from pipeline.wording import said, traceback_of
from workers.processes.interrupts import Interrupts
from workers.telemetry.records import Judged

__all__ = ["Broken", "run_point", "run_points"]

_LOOK_S = 0.2  # between two looks for an interrupt or a run that takes too long


@dataclasses.dataclass(frozen=True)
class Broken:
    """A point without an outcome: not a finding, something went wrong; ``details`` is a traceback, or empty."""

    message: str
    details: str = ""


def run_point(source: NamedRecipe, plan: Plan) -> Outcome:
    """Train in this process, in the reference driver; raises StageError.

    A run that ended itself because its numbers were no longer finite, or ran away, is an outcome too.
    """
    start = time.perf_counter()
    recipe = source()
    try:
        result = run_reference(recipe, plan)
    except StageError as error:
        if not isinstance(error.__cause__, FloatingPointError):
            raise
        return Outcome(diverged=str(error), batches=error.batch or 0, seconds=time.perf_counter() - start)
    tail = result.losses[-max(1, len(result.losses) // 10) :]
    train_loss = sum(tail) / len(tail)
    evaluations = tuple((updates, _finite(scores.loss()), scores.accuracy()) for updates, scores in result.scores)
    _, loss, accuracy = evaluations[-1] if evaluations else (0, _finite(train_loss), None)
    judged = [
        Judged(stage, each.batch, each.cosine, each.norm_ratio, each.error, 0)
        for stage, found in result.qualities.items()
        for each in found
    ]
    quality = summarised(judged, len(result.losses))
    flops = count_flops(recipe, result.resolved.plan, result.resolved.cuts)
    return Outcome(
        loss=loss,
        accuracy=accuracy,
        train_loss=_finite(train_loss),
        batches=len(result.losses),
        reached=result.reached,
        evaluations=evaluations,
        quality=tuple(dataclasses.replace(each, error=_finite(each.error)) for each in quality),
        flops=tuple(map(dataclasses.asdict, flops)),
        seconds=time.perf_counter() - start,
    )


def run_points(points: Sequence[Point], jobs: int, within_s: float) -> Generator[tuple[Point, Outcome | Broken]]:
    """Run points, at most ``jobs`` at a time, each for at most ``within_s`` seconds; gives what each gave as it ends.

    Raises KeyboardInterrupt at most 0.2 s after SIGINT (or SIGTERM, where it has a handler), or when the next point is
    asked for. No process is left when the iteration ends or is closed.
    """
    waiting, idle = deque(points), list[Child]()
    at_work: dict[Child, tuple[Point, float]] = {}
    everybody: list[Child] = []
    with Interrupts() as interrupts, ending(everybody):
        while waiting or at_work:
            interrupts.raise_noted()
            while waiting and len(at_work) < jobs:
                if not idle:
                    idle.append(Child("sweep", _work))
                    everybody.append(idle[-1])
                child, point = idle.pop(), waiting.popleft()
                at_work[child] = point, time.monotonic() + within_s
                with contextlib.suppress(BrokenPipeError):  # it died: that is heard next
                    child.pipe.send((point.source, point.plan))
            ready: Sequence[object] = mp_connection.wait(cast(Any, list(at_work)), _LOOK_S)
            for child, (point, deadline) in list(at_work.items()):
                if child in ready or time.monotonic() > deadline:
                    del at_work[child]
                    said = _heard(child, within_s, late=child not in ready)
                    if not child.pipe.closed:
                        idle.append(child)
                    yield point, said


def _heard(child: Child, within_s: float, *, late: bool) -> Outcome | Broken:
    """What became of the point; a process that is dead or too late is ended."""
    if late:
        how = f"did not end within {within_s:g} s: give it longer with --within-s"
    else:
        try:
            found: Outcome | Broken = child.take()
            return found
        except ChildDied as died:
            how = f"{died}; look at the system's log for an out-of-memory kill"
    child.kill()
    child.reap()
    return Broken(f"the run (pid {child.pid}) {how}")


def _work(pipe: Connection) -> None:
    """In a process: point after point, as the driver sends them."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            source, plan = pipe.recv()
            try:
                found: Outcome | Broken = run_point(source, plan)
            except Exception as error:
                found = Broken(said(error), traceback_of(error))
            pipe.send(found)


def _finite(value: float | None) -> float | None:
    """What JSON can hold: infinities and what is no number become null."""
    return value if value is not None and math.isfinite(value) else None
