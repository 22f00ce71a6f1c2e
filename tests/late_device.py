"""A device that does nothing before somebody waits for it: what a GPU may do at worst, on the CPU.

What goes from one of them to another goes over gloo: nobody waits for that, and it comes when it comes. A payload is
read from its memory when it leaves, and its place is garbage until it has come.

Its computing stream is the host; its copying stream is a list of what is still to be done. Handles and events work
between processes, as those of CUDA do: an event's ``wait`` is for the last ``record`` that was called before it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from workers.channels.net.gloo import Meeting, Pair, PairBroken
from workers.wiring.edges import ENGINES

DEVICE = "late:0"
DEADLINE_S = 20.0
_GARBAGE = 0xAA


def register() -> None:
    """Make ``late:0`` a device that channels know, in this process."""
    ENGINES["late"] = LateEngine


STANDSTILL = threading.Event()
"""While set, devices of this process do nothing at all."""
WIRES_DOWN = threading.Event()
"""While set, wires of this process carry nothing."""


@contextlib.contextmanager
def wires_down() -> Iterator[None]:
    """Carry nothing in this block."""
    WIRES_DOWN.set()
    try:
        yield
    finally:
        WIRES_DOWN.clear()


class LateEngine:
    """See ``workers.channels.engine.Engine``."""

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

    def wire(self, meeting: Meeting, name: str, side: int, within_s: float) -> LateLink:
        return LateLink(Pair.join(meeting, f"{name}, payloads", side, within_s), (meeting.store.port, name), side)

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


class LateLink:
    """A ``DeviceLink``: does one thing after the other, in a thread, which is the device.

    Attributes:
        under_way: number of sends or receives that are queued and not over.
        breaks: what they do instead of carrying anything, if set.
    """

    def __init__(self, pair: Pair, name: tuple[int, str], side: int) -> None:
        self.is_cut, self.under_way, self.breaks = False, 0, ""
        self._pair, self._name, self._sends = pair, name, side == 0
        self._queued: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._carry, name="late wire", daemon=True)
        self._thread.start()
        if self._sends:
            _SENT[name] = 0

    def send(self, payload: Tensor) -> Transfer:
        assert self._sends
        _SENT[self._name] += 1
        return self._queue(payload)

    def receive(self, payload: Tensor) -> Transfer:
        assert not self._sends
        if self._name in _SENT:  # by this process
            _RECEIVED[self._name] += 1
            assert _RECEIVED[self._name] <= _SENT[self._name], "a receive would spin for what nobody has sent"
        payload.fill_(_GARBAGE)
        return self._queue(payload)

    def cut(self) -> None:
        with self._lock:
            if not self.is_cut:
                self.is_cut = True
                with contextlib.suppress(PairBroken):  # as Pair.cut, but a payload that nobody received may come still
                    self._pair.wait(
                        self._pair.expect(torch.empty(1 << 25, dtype=torch.uint8)), timedelta(milliseconds=1)
                    )
                self._queued.put(None)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _queue(self, payload: Tensor) -> Transfer:
        assert len(payload), "nothing is not worth a kernel"
        if self.is_cut:
            raise PairBroken("the wire is cut")
        transfer = Transfer(payload)
        with self._lock:
            self.under_way += 1
        self._queued.put(transfer)
        return transfer

    def _carry(self) -> None:
        while (transfer := self._queued.get()) is not None:
            _until(lambda: self.is_cut or not WIRES_DOWN.is_set(), "the wires")
            if self.breaks:
                transfer.failed = PairBroken(self.breaks)
            elif not self.is_cut:
                self._carry_one(transfer.payload)
            with self._lock:
                self.under_way -= 1
            transfer.over.set()

    def _carry_one(self, payload: Tensor) -> None:
        try:
            self._pair.wait(self._pair.send(payload) if self._sends else self._pair.expect(payload))
        except PairBroken:
            _until(lambda: self.is_cut, "the peer, which is dead")  # nobody tells a kernel


class Transfer:
    """A payload on its way."""

    def __init__(self, payload: Tensor) -> None:
        self.payload, self.over = payload, threading.Event()
        self.failed: PairBroken | None = None

    def synchronize(self) -> None:
        assert self.over.wait(DEADLINE_S), f"the wire carried nothing for {DEADLINE_S:.0f} s"
        if self.failed is not None:
            raise self.failed


_SENT: dict[tuple[int, str], int] = {}
_RECEIVED: Counter[tuple[int, str]] = Counter()
"""How many payloads, by wire."""


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
