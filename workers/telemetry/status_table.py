"""The status board: what every worker is doing now, readable by the driver even when a worker can no longer speak.

| stop enough |  worker 0: span batch start_ns progress |  worker 1: ... |      one cache line each, one writer each
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from dataclasses import dataclass
from typing import Self

import posix_ipc

from pipeline.metrics.spans import Span
from workers.clock import now_ns

__all__ = ["Status", "StatusTable"]

_LINE_BYTES = 64
_STATUS = struct.Struct("<qqqq")


@dataclass(frozen=True)
class Status:
    """One line of the board: what a worker does."""

    span: Span
    batch: int  # or -1
    start_ns: int  # on the common clock; 0: it has not begun
    progress: int  # how often it has turned to something that is work

    def age_s(self) -> float:
        """Seconds since it began."""
        return (now_ns() - self.start_ns) * 1e-9


class StatusTable:
    """A few shared cache lines, by their name in shared memory. The driver creates them, the workers open them."""

    def __init__(self, name: str, workers: int, *, create: bool = False) -> None:
        self.workers = workers
        size = _LINE_BYTES * (workers + 1)
        flags = posix_ipc.O_CREX if create else 0
        memory = posix_ipc.SharedMemory(f"/{name}", flags, size=size if create else 0)
        self._map = mmap.mmap(memory.fd, size)
        memory.close_fd()

    def write(self, worker: int, span: Span, batch: int, start_ns: int, progress: int) -> None:
        """Say what a worker does now; called by that worker only."""
        _STATUS.pack_into(self._map, _LINE_BYTES * (worker + 1), span, batch, start_ns, progress)

    def read(self, worker: int) -> Status:
        """What a worker does now."""
        span, batch, start_ns, progress = _STATUS.unpack_from(self._map, _LINE_BYTES * (worker + 1))
        return Status(Span(span), batch, start_ns, progress)

    def progress(self) -> int:
        """A number that changes whenever any worker turns to new work."""
        return sum(self.read(worker).progress for worker in range(self.workers))

    def stop(self) -> None:
        """Ask all workers to end; they look before every action."""
        self._map[0] = 1

    @property
    def stopping(self) -> bool:
        """Whether they were asked to end."""
        return self._map[0] != 0

    def end_early(self) -> None:
        """Ask stage 0 to take no further training batch; all workers finish what is in the pipeline."""
        self._map[1] = 1

    @property
    def enough(self) -> bool:
        """Whether it was asked to end early."""
        return self._map[1] != 0

    @staticmethod
    def unlink_name(name: str) -> None:
        """Remove the name; whoever has attached goes on. A name already removed is no error."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(f"/{name}")

    def close(self) -> None:
        """Give up this process's view."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
