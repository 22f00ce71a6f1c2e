"""How a run of processes can end badly, each with what the user has to know."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from pipeline.metrics.spans import WAITING, Span
from pipeline.plan.plan import Plan
from pipeline.plan.replica_layout import called
from workers.telemetry.records import Failure
from workers.telemetry.status_table import Status

__all__ = ["RunFailed", "killed", "nobody_moves", "process_state"]

_WHERE_TO_LOOK = {-signal.SIGKILL: "look at the system's log for an out-of-memory kill"}
_WAITING = (*WAITING, Span.OTHER)


class RunFailed(RuntimeError):
    """A worker failed, died or stalled; the run is over and everything is cleaned up.

    Attributes:
        stage: where it began; None: in none of them.
        layer: which was running, if any.
        batch: in work, if any; the replica's own count.
        details: the worker's traceback, or the stall report; may be empty.
        shown: of it, what tells the user more than the message: of a traceback what leads through the user's own code.
        report: the file that has all of it, once it is written.
    """

    def __init__(
        self,
        message: str,
        *,
        stage: int | None,
        layer: str | None = None,
        batch: int | None = None,
        details: str = "",
        shown: str | None = None,
    ) -> None:
        super().__init__(message)
        self.stage, self.layer, self.batch, self.details = stage, layer, batch, details
        self.shown = details if shown is None else shown
        self.report: Path | None = None

    @classmethod
    def from_record(cls, failure: Failure, host: str = "") -> RunFailed:
        """What a worker reported before it ended; ``host`` where there is more than this one."""
        return cls(
            f"{failure.message} (pid {failure.pid}{_on(host)})",
            stage=failure.stage,
            layer=failure.layer,
            batch=failure.batch,
            details=failure.traceback,
            shown=failure.shown,
        )


def killed(stage: int, pid: int, exit_code: int, status: Status, host: str = "", name: str | None = None) -> RunFailed:
    """A worker ended without a word; ``host`` where there is more than this one, ``name`` where there are replicas."""
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exited with {exit_code}"
    doing = f", {status.span.name.lower()} of batch {status.batch}" if status.batch >= 0 else ""
    who = f"{name or f'stage {stage}'} (pid {pid}{_on(host)})"
    return RunFailed(
        f"{who} {how}{doing}; {_WHERE_TO_LOOK.get(exit_code, 'what it printed stands above, if it said anything')}",
        stage=stage,
        batch=status.batch if status.batch >= 0 else None,
    )


def nobody_moves(
    workers: Sequence[tuple[Status, str, str]], stall_after_s: float, stacks: str, plan: Plan
) -> RunFailed:
    """Nobody did anything new: name the stage that began its work longest ago, and who waits.

    ``workers``: of every one what it does, what to call its process, like ``"pid 12"``, and the process's state letter.
    ``stacks``: where their stacks lie.
    """
    names = [called(plan, *divmod(k, plan.stages)) for k in range(len(workers))]
    lines = [_line(name, *worker) for name, worker in zip(names, workers, strict=True)]
    busy = [k for k, (status, *_) in enumerate(workers) if status.span not in _WAITING]
    stopped = [k for k, (_, _, state) in enumerate(workers) if state == "T"]
    culprit = min(stopped or busy or range(len(workers)), key=lambda k: workers[k][0].start_ns)
    status, name, state = workers[culprit]
    lines[culprit] += "   <- oldest work" if culprit in busy else "   <- here"
    batch = status.batch if status.batch >= 0 else None
    doing = status.span.name.lower() if batch is None else f"{status.span.name.lower()} batch {batch}"
    return RunFailed(
        f"no progress for {stall_after_s:.1f} s: {names[culprit]} ({name}) is in {doing} for {status.age_s():.1f} s"
        f"{_stopped(state)}",
        stage=culprit % plan.stages,
        batch=batch,
        details="\n".join([*lines, f"stacks of the workers: {stacks}    raise the limit: --stall-after-s"]),
    )


def process_state(pid: int) -> str:
    """The state letter of /proc, or '' where there is no such thing."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _line(who: str, status: Status, name: str, state: str) -> str:
    what = "waits" if status.span in _WAITING else "busy "
    return (
        f"  {who}  {what}  {status.span.name.lower():<10} batch {status.batch:<7} "
        f"{status.age_s():7.1f} s  {name}{_stopped(state)}"
    )


def _stopped(state: str) -> str:
    return " (the process is stopped: SIGSTOP, or a debugger)" if state == "T" else ""


def _on(host: str) -> str:
    return f" on {host}" if host else ""
