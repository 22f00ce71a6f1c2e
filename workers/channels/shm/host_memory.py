"""The host's shared memory as a run sees it: names that tell whose they are, free space, what the dead left.

A run's entries in /dev/shm all start with `new_prefix`: segments ``fw-<driver pid>-...`` and semaphores
``sem.fw-<driver pid>-...``. So a later run can tell which belong to a driver that is no more.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path

from pipeline.errors import PlanError

__all__ = ["check_shared_memory", "new_prefix", "sweep_stale", "too_little"]

_DIRECTORY = Path("/dev/shm")
_NAMESPACE = Path("/proc/self/ns/pid")


def new_prefix() -> str:
    """A new common start for the names of one run: ``fw-<this pid>-<PID namespace><random>``."""
    return f"fw-{os.getpid()}-{_pid_namespace()}{secrets.token_hex(3)}"


def check_shared_memory(needed_bytes: int) -> None:
    """Refuse a plan whose channels do not fit, before anything starts: a ``PlanError`` with figures and remedy."""
    if _DIRECTORY.is_dir():
        state = os.statvfs(_DIRECTORY)
        free_bytes = state.f_bavail * state.f_frsize
        if free_bytes < needed_bytes:
            raise too_little(needed_bytes, f"{_readable(free_bytes)} are")


def too_little(needed_bytes: int, free: str = "less than that is") -> PlanError:
    """The error for shared memory that does not suffice."""
    return PlanError(
        f"too little shared memory: the channels need {_readable(needed_bytes)}, {free} free in {_DIRECTORY}."
        f" Use fewer slots, a smaller batch, or a bigger {_DIRECTORY} (mount -o remount,size=...;"
        " in a container: --shm-size)."
    )


def sweep_stale() -> list[str]:
    """Remove what runs left in /dev/shm whose driver was killed before it could unlink the names; returns them.

    Only this user's files of this PID namespace: the processes of another container that shares /dev/shm cannot be
    seen from here, and look dead.
    """
    pattern = re.compile(rf"(?:sem\.)?fw-(\d{{1,9}})-{_pid_namespace()}[0-9a-f]+")
    removed = []
    for entry in sorted(_DIRECTORY.iterdir()) if _DIRECTORY.is_dir() else ():
        if (match := pattern.match(entry.name)) and not _alive(int(match[1])):
            with contextlib.suppress(OSError):
                state = entry.lstat()
                if stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid():
                    entry.unlink()
                    removed.append(entry.name)
    return removed


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB ({num_bytes:,} bytes)"


def _pid_namespace() -> str:
    return f"{_NAMESPACE.stat().st_ino & 0xFFFF:04x}" if _NAMESPACE.exists() else "0000"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
