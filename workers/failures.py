"""How a run of processes can end badly, each with what the user has to know."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pipeline.spans import Span
from workers.board import Board, Status
from workers.records import Failure

__all__ = ["RunFailed", "killed", "stalled"]

_WAITING = (Span.WAIT, Span.OTHER)


class RunFailed(RuntimeError):
    """A worker failed, died or stalled; the run is over and everything is cleaned up.

    Attributes:
        stage: the stage where it began.
        layer: the layer, if one was running.
        batch: the batch in work, if any.
        details: the worker's traceback, or the stall report; may be empty.
    """

    def __init__(
        self, message: str, *, stage: int, layer: str | None = None, batch: int | None = None, details: str = ""
    ) -> None:
        super().__init__(message)
        self.stage, self.layer, self.batch, self.details = stage, layer, batch, details

    @classmethod
    def from_record(cls, failure: Failure) -> RunFailed:
        """What a worker reported before it ended."""
        return cls(
            f"{failure.message} (pid {failure.pid})",
            stage=failure.stage,
            layer=failure.layer,
            batch=failure.batch,
            details=failure.traceback,
        )


def killed(stage: int, pid: int, exit_code: int, status: Status) -> RunFailed:
    """A worker ended without a word."""
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exited with {exit_code}"
    doing = f", {status.span.name.lower()} of batch {status.batch}" if status.batch >= 0 else ""
    return RunFailed(
        f"stage {stage} (pid {pid}) {how}{doing}; look at the system's log for an out-of-memory kill",
        stage=stage,
        batch=status.batch if status.batch >= 0 else None,
    )


def stalled(board: Board, pids: Sequence[int], stall_after_s: float, stacks: str) -> RunFailed:
    """Nobody did anything new: name the stage that began its work longest ago, and who waits."""
    lines = [_line(stage, board.read(stage), pid) for stage, pid in enumerate(pids)]
    busy = [k for k in range(len(pids)) if board.read(k).span not in _WAITING]
    suspects = [k for k, pid in enumerate(pids) if _process_state(pid) == "T"] or busy or list(range(len(pids)))
    culprit = min(suspects, key=lambda stage: board.read(stage).start_ns)
    lines[culprit] += "   <- oldest work" if culprit in busy else "   <- here"
    message = (
        f"no progress for {stall_after_s:.1f} s: stage {culprit} (pid {pids[culprit]}) "
        f"{_doing(board.read(culprit))} for {board.read(culprit).age_s():.1f} s{_stopped(pids[culprit])}"
    )
    details = "\n".join([*lines, f"stacks of the workers: {stacks}    raise the limit: --stall-after-s"])
    status = board.read(culprit)
    return RunFailed(message, stage=culprit, batch=status.batch if status.batch >= 0 else None, details=details)


def _line(stage: int, status: Status, pid: int) -> str:
    state = "waits" if status.span in _WAITING else "busy "
    return (
        f"  stage {stage}  {state}  {status.span.name.lower():<10} batch {status.batch:<7} "
        f"{status.age_s():7.1f} s  pid {pid}{_stopped(pid)}"
    )


def _doing(status: Status) -> str:
    batch = f" batch {status.batch}" if status.batch >= 0 else ""
    return f"is in {status.span.name.lower()}{batch}"


def _stopped(pid: int) -> str:
    return " (the process is stopped: SIGSTOP, or a debugger)" if _process_state(pid) == "T" else ""


def _process_state(pid: int) -> str:
    """The state letter of /proc, or '' where there is no such thing."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
