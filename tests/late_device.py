"""A device that does nothing before somebody waits for it: what a GPU may do at worst, on the CPU.

Its computing stream is the host; its copying stream is a list of what is still to be done. Handles and events work
between processes, as those of CUDA do: an event's ``wait`` is for the last ``record`` that was called before it.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.edges import ENGINES

DEVICE = "late:0"
DEADLINE_S = 20.0
_GARBAGE = 0xAA


def register() -> None:
    """Make ``late:0`` a device that channels know, in this process."""
    ENGINES["late"] = LateEngine


STANDSTILL = threading.Event()
"""While set, devices of this process do nothing at all."""


class LateEngine:
    """See ``workers.peer.PeerEngine``."""

    def __init__(self, device: str) -> None:
        self._todo: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    def empty(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), _GARBAGE, dtype=torch.uint8)

    def pin(self, memory: memoryview) -> Callable[[], None]:
        assert torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % mmap.PAGESIZE == 0, "pages can be pinned"
        return lambda: None

    def snapshot(self, into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for mine, tensor in zip(into, tensors, strict=True):
                mine.copy_(tensor.detach())

    def copy(self, into: Tensor, source: Tensor) -> None:
        self._todo.append(lambda: _copied(into, source))

    def fetch(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        fetched = tuple(torch.empty_like(tensor) for tensor in tensors)
        for mine, tensor in zip(fetched, tensors, strict=True):
            self._todo.append(lambda mine=mine, tensor=tensor: _copied(mine, tensor))  # type: ignore[misc]
        if not STANDSTILL.is_set():
            self.advance()  # computing waits for it
        return fetched

    def mark(self) -> Mark:
        return Mark(self)

    def shareable(self, num_bytes: int) -> tuple[Tensor, bytes]:
        memory, handle = _shared(num_bytes)
        memory.fill_(_GARBAGE)
        return memory, handle

    def opened(self, handle: bytes, num_bytes: int) -> Tensor:
        return _opened(handle, num_bytes)

    def signal(self) -> tuple[Counts, bytes]:
        memory, handle = _shared(16)
        return Counts(memory), handle.ljust(64, b"\0")

    def opened_signal(self, handle: bytes) -> Counts:
        assert len(handle) == 64
        return Counts(_opened(handle.rstrip(b"\0"), 16))

    def record(self, signal: Counts) -> None:
        signal.counts[0] += 1
        number = int(signal.counts[0])
        self._todo.append(lambda: signal.counts[1].fill_(number))
        if not STANDSTILL.is_set():
            self.advance()

    def wait(self, signal: Counts) -> None:
        number = int(signal.counts[0])
        self._todo.append(lambda: _until(lambda: int(signal.counts[1]) >= number, "the event"))

    def advance(self, until: Callable[[], None] | None = None) -> None:
        """Do what is to be done, in order; up to a step and with it, or everything."""
        with self._lock:
            while self._todo and (until is None or until in self._todo):
                step = self._todo.pop(0)
                step()
                if step is until:
                    return


class Mark:
    """The last step so far."""

    def __init__(self, engine: LateEngine) -> None:
        self._engine, self._step = engine, engine._todo[-1] if engine._todo else None

    def synchronize(self) -> None:
        """Do everything up to here."""
        _until(lambda: not STANDSTILL.is_set(), "the end of the standstill")
        if self._step is not None:
            self._engine.advance(self._step)


class Counts:
    """How often an event was recorded, and how far the device has come with that."""

    def __init__(self, memory: Tensor) -> None:
        self.counts = memory.view(torch.int64)


def _copied(into: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        into.copy_(source)


def _until(what: Callable[[], bool], name: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < end, f"the device waited {DEADLINE_S:.0f} s for {name}"
        os.sched_yield()


def _shared(num_bytes: int) -> tuple[Tensor, bytes]:
    """Memory without a name, and where other processes find it: nothing can stay behind."""
    file = os.memfd_create("late")
    os.ftruncate(file, num_bytes)
    _OPEN.append(file)
    return _mapped(file, num_bytes), f"/proc/{os.getpid()}/fd/{file}".encode()


def _opened(handle: bytes, num_bytes: int) -> Tensor:
    file = os.open(handle, os.O_RDWR)
    try:
        return _mapped(file, num_bytes)
    finally:
        os.close(file)


def _mapped(file: int, num_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8)


_OPEN: list[int] = []
"""Handles must stay good as long as the process lives."""
