"""A run's workers from their start to the verdict: all have finished, the first real failure, a stall, or an interrupt.

    start  ->  Ready from all  ->  go  ->  what they report  ->  Finished from all

The same for workers that are children of this process and for those that other hosts' agents have started.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Self

from pipeline.plan.replica_layout import called
from pipeline.run.resolved import Resolved
from workers.errors import RunFailed, killed, nobody_moves
from workers.supervision import control_records as control
from workers.supervision.stall import Progress
from workers.telemetry import records
from workers.telemetry.status_table import Status

__all__ = ["Heard", "Supervisor"]

Heard = tuple[int, control.Control]
"""(number of the worker, what it or its agent said)."""
_START_WITHIN_S = 120.0
_WRONG = records.Failure, control.WorkerDied, control.RankGone


class Supervisor(ABC):
    """Some workers of a run; ends them on the way out.

    ``asked``: whether somebody asked this process to end (SIGINT, SIGTERM) since the last call.
    """

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked
        self.resolved: Resolved | None = None  # not known yet
        self.run_dir: Path | None = None

    @property
    @abstractmethod
    def workers(self) -> Sequence[int]:
        """Their numbers."""

    @abstractmethod
    def hear(self) -> list[Heard]:
        """What has been said since the last look, deaths included, times on this host's clock; waits at most 0.2 s."""

    @abstractmethod
    def read(self, worker: int) -> Status:
        """What a worker did when last heard of."""

    @abstractmethod
    def process(self, worker: int) -> tuple[str, str]:
        """A worker's process: what to call it, like ``pid 17 on beta``, and its state letter in /proc."""

    @abstractmethod
    def go(self) -> None:
        """Tell all that everybody is ready."""

    @abstractmethod
    def end_early(self) -> None:
        """Ask the first stages to take no further training batch; all workers finish what is in the pipeline."""

    @abstractmethod
    def dump(self) -> None:
        """Have all write the stacks of their threads; blocks at most 2 s."""

    @abstractmethod
    def end(self, error: BaseException | None = None) -> None:
        """End all workers, because of ``error`` if any; a second call does nothing. Blocks for some seconds at most."""

    def host(self, worker: int) -> str:
        """Name of a worker's host; empty: this one."""
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end(error)

    def trained(self) -> Iterator[records.Record]:
        """Yield what the started workers report, until all have finished.

        Raises:
            RunFailed: a worker reported a failure, died, did not start in 120 s, or nobody made progress for the plan's
                ``stall_after_s``.
            KeyboardInterrupt: somebody asked to end.
        """
        assert self.resolved is not None, "a run that is started is known"
        yield from self._reported(records.Ready, _START_WITHIN_S)
        self.go()
        yield from self._reported(records.Finished, self.resolved.plan.stall_after_s)

    def _reported(self, last: type[records.Record], patience_s: float) -> Iterator[records.Record]:
        return (record for _, record in self.until(last, patience_s) if isinstance(record, records.Record))

    def until(self, last: type[control.Control], patience_s: float) -> Iterator[Heard]:
        """Yield what is heard until every worker's last record is one of type ``last``; raises as `trained`."""
        assert self.resolved is not None, "nobody is waited for before the run is known"
        awaited = set(self.workers)
        progress = Progress(self.read, self.resolved.plan, patience_s)
        while awaited:
            heard = self.hear_or_raise()
            for worker, record in heard:
                if isinstance(record, last):
                    awaited.discard(worker)
                yield worker, record
            spoke = {k for k, record in heard if not isinstance(record, control.WorkerStatus | control.Time)}
            if progress.stalled(spoke, awaited):
                self.dump()
                seen = [(self.read(worker), *self.process(worker)) for worker in self.workers]
                stacks = str(self.run_dir / "*stacks-*.txt") if self.run_dir is not None else "none"
                raise nobody_moves(seen, patience_s, stacks, self.resolved.plan)

    def hear_or_raise(self) -> list[Heard]:
        """As `hear`; raises where something went wrong, or somebody asked to end."""
        heard = self.hear()
        self.raise_failure(heard)
        self.raise_interrupt(heard)
        return heard

    def raise_failure(self, heard: Sequence[Heard]) -> None:
        """Raise RunFailed for the first thing that went wrong, if any.

        A worker killed by a signal goes before what others report: they may have failed because of it. Else it is the
        earliest reported failure, then any death, then an agent that is gone.
        """
        if not any(isinstance(record, _WRONG) for _, record in heard):
            return
        heard = [*heard, *self.hear()]  # the cause was sent before its consequences, but maybe read after
        failed = [(worker, record) for worker, record in heard if isinstance(record, records.Failure)]
        died = [(worker, record) for worker, record in heard if isinstance(record, control.WorkerDied)]
        if failed and not any(death.exit_code < 0 for _, death in died):
            worker, failure = min(failed, key=lambda one: one[1].time_ns)
            raise RunFailed.from_record(failure, self.host(worker))
        if died:
            worker, death = min(died, key=lambda one: one[1].exit_code)
            host, (stage, name) = self.host(worker), self.place(worker)
            if death.why:
                raise RunFailed(f"on {host}, {death.why}" if host else death.why, stage=None)
            raise killed(stage, death.pid, death.exit_code, self.read(worker), host, name)
        raise next(self.gone(worker, record) for worker, record in heard if isinstance(record, control.RankGone))

    def raise_interrupt(self, heard: Sequence[Heard]) -> None:
        """Raise KeyboardInterrupt if this process, or an agent, was asked to end."""
        if self.asked() or any(isinstance(record, control.Interrupted) for _, record in heard):
            self.interrupt()

    def interrupt(self) -> NoReturn:
        """Somebody asked to end."""
        raise KeyboardInterrupt

    def gone(self, worker: int, record: control.RankGone) -> RunFailed:
        """What to raise for an agent that is gone."""
        raise AssertionError("workers of this host have no agent")

    def place(self, worker: int) -> tuple[int, str]:
        """A worker's stage, and what users see the worker called."""
        if self.resolved is None:
            return worker, f"stage {worker}"
        replica, stage = divmod(worker, self.resolved.plan.stages)
        return stage, called(self.resolved.plan, replica, stage)
