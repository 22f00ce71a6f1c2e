"""NCCL as a wire: one group of two ranks per directed edge. The only file that knows it.

What NCCL and ProcessGroupNCCL really do (their sources as of torch 2.11 to 2.13), and what follows from it:

* A send or receive is a kernel that spins until the other side's runs; `workers.channels.gpu.nccl_ends` says how nobody
  spins in vain. One group for both directions can deadlock, so each edge has its own, made directly, not by
  ``new_group``. It is eagerly connected: else the first message makes yet another communicator. The first message
  between two ranks sets up the transport, and blocks the host until both are in it: one byte travels at the opening.
* A watchdog thread per group would end the whole process, with nothing but a log, when an operation takes longer than
  the group's timeout or NCCL reports an error, such as a dead peer. TORCH_NCCL_BLOCKING_WAIT=1, which is read when a
  group is made and set only then, leaves out the watchdog, its monitor and the timeout. What blocks then is
  ``Work.wait``, called for its error only: ``block_current_stream`` orders an event behind the operation.
* Nobody else asks NCCL for errors then: who waits for a transfer does, once a second.
* ``ncclCommAbort`` frees spinning kernels at once. It also frees memory, which waits for every kernel of the device,
  those of other communicators too (NCCL #1013): each wire is cut in a thread of its own, so that several can be freed
  together, and is waited for 5 s at most. ``ncclCommDestroy`` would wait for the peer, so every wire ends by abort, a
  healthy one too: by then the peer has said that everything arrived.
* NCCL refuses two ranks on one GPU: `pipeline.plan.channel_choice` does not let it come to that.
* What waits for the whole device on both sides at once (cudaFree, when memory runs out) while payloads go both ways can
  block for ever, as with every use of NCCL: the run's report of a stall ends it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from workers.channels.errors import ChannelTimeout
from workers.channels.net.gloo import Meeting, PairBroken

__all__ = ["NcclLink", "nccl_here"]

_T = TypeVar("_T")
_WHILE_MADE = {
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",  # one edge is one queue: that is what we want
}
_LOOK_EVERY_S = 50e-6
_ASK_EVERY_S = 1.0
_CUT_WITHIN_S = 5.0
_SAID_AT_MOST = 400


def nccl_here() -> bool:
    """Whether this torch is built with NCCL; asks nothing of CUDA."""
    return dist.is_available() and dist.is_nccl_available()


class NcclLink:
    """The ``workers.channels.engine.DeviceLink`` of NCCL. Use ``join``."""

    is_cut = False

    def __init__(self, group: Any, peer: int, device: torch.device) -> None:
        self._group, self._peer = group, peer
        self._stream = torch.cuda.Stream(device)  # computes nothing: events behind the group's own stream
        self._queueing = threading.Lock()
        self._cutting = threading.Lock()
        self._aborting: threading.Thread | None = None

    @classmethod
    def join(cls, device: torch.device, meeting: Meeting, name: str, side: int, within_s: float) -> Self:
        """Connect this device and that of the process that joins the other side; see ``Engine.wire``."""
        both = f"{device} with the {'sender' if side else 'receiver'}'s GPU"
        try:
            return _within(within_s, lambda: cls._connected(device, meeting, name, side, within_s))
        except TimeoutError as error:
            raise ChannelTimeout(
                f"{name}: NCCL did not connect {both} within {within_s:.3g} s: NCCL_DEBUG=INFO tells how far it comes, "
                "NCCL_SOCKET_IFNAME names the network interface. Or choose channels gloo"
            ) from error
        except PairBroken as error:
            raise RuntimeError(
                f"{name}: NCCL does not connect {both} ({error}): NCCL_DEBUG=INFO tells why. Or choose channels gloo"
            ) from error

    @classmethod
    def _connected(cls, device: torch.device, meeting: Meeting, name: str, side: int, within_s: float) -> Self:
        with _told():
            options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # the other side's kernel spins
            options._timeout = timedelta(seconds=within_s)
            options.global_ranks_in_group = [0, 1]
            options.group_name = name
            store = dist.PrefixStore(f"{name}, payloads", meeting.store)  # type: ignore[attr-defined]
            with _environment(_WHILE_MADE):
                group = dist.ProcessGroupNCCL(store, side, 2, options)
            group.eager_connect_single_device(device)
        wire, first = cls(group, 1 - side, device), torch.zeros(1, dtype=torch.uint8, device=device)
        torch.cuda.current_stream(device).synchronize()
        (wire.receive if side else wire.send)(first).synchronize()
        return wire

    def send(self, payload: Tensor) -> _Transfer:
        return self._queued(self._group.send, payload)

    def receive(self, payload: Tensor) -> _Transfer:
        return self._queued(self._group.recv, payload)

    def cut(self) -> None:
        """Blocks 5 s at most."""
        with self._cutting:
            if self._aborting is None:
                self.is_cut = True
                self._aborting = threading.Thread(target=self._abort, name="NCCL, abort", daemon=True)
                self._aborting.start()
        self._aborting.join(_CUT_WITHIN_S)

    def _queued(self, post: Callable[..., Any], payload: Tensor) -> _Transfer:
        with self._queueing, _told():
            if self.is_cut:
                raise PairBroken("this side of NCCL's connection is cut")
            with torch.cuda.stream(self._stream):
                work = post([payload], self._peer, 0)
                work.block_current_stream()
            event = torch.cuda.Event()
            event.record(self._stream)
            return _Transfer(work, event, self._stream)

    def _abort(self) -> None:
        queueing = self._queueing.acquire(timeout=_CUT_WITHIN_S / 2)  # a communicator must not go from under a post
        try:
            with contextlib.suppress(RuntimeError):
                self._group.abort()
        finally:
            if queueing:
                self._queueing.release()


class _Transfer:
    """What NCCL was asked to do; keeps it alive."""

    def __init__(self, work: Any, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        self._work, self._event, self._stream = work, event, stream

    def synchronize(self) -> None:
        """Raises ``PairBroken`` for what NCCL says of the connection."""
        with _told():
            ask_at = time.monotonic() + _ASK_EVERY_S
            while not self._event.query():
                time.sleep(_LOOK_EVERY_S)
                if time.monotonic() > ask_at:
                    ask_at += _ASK_EVERY_S
                    if self._work.is_completed():  # or failed
                        with torch.cuda.stream(self._stream):
                            self._work.wait(timedelta(milliseconds=1))  # raises what failed


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """torch's errors, as those of a connection."""
    try:
        yield
    except RuntimeError as error:
        raise PairBroken(" ".join(str(error).split())[:_SAID_AT_MOST]) from error


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ[name] for name in changes if name in os.environ}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in changes:
            del os.environ[name]
        os.environ.update(before)


def _within(within_s: float, call: Callable[[], _T]) -> _T:
    """What ``call`` gives, from a thread that is left to itself where that takes too long: a ``TimeoutError``."""
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="NCCL, connect", daemon=True).start()
    return answer.result(within_s)
