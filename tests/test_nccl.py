"""What is done with a group of NCCL, checked with a group of gloo in its place: this machine may have no GPU."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from workers.channels.errors import ChannelTimeout
from workers.channels.gpu import nccl
from workers.channels.gpu.nccl import NcclLink, nccl_here
from workers.channels.net.gloo import PairBroken, Rendezvous

DEADLINE_S = 20.0
CPU = torch.device("cpu")
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


class Group:
    """Has what `NcclLink` uses of ProcessGroupNCCL, as `torch/_C/_distributed_c10d.pyi` declares it."""

    Options = staticmethod(lambda is_high_priority_stream: SimpleNamespace(high=is_high_priority_stream))
    connects: threading.Event
    says = ""
    aborts: threading.Event

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        assert (size, options.high, options._timeout) == (2, True, timedelta(seconds=DEADLINE_S))
        assert os.environ[BLOCKING_WAIT] == "1", "else a watchdog would end the process"
        self._joined = store, rank, size, options._timeout
        self.num_aborts = 0

    def eager_connect_single_device(self, device: torch.device) -> None:
        assert os.environ.get(BLOCKING_WAIT) == "user's own", "what is set for a group is no other's"
        assert self.connects.wait(DEADLINE_S)
        if self.says:
            raise RuntimeError(self.says)
        self._gloo = dist.ProcessGroupGloo(*self._joined)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        return Work(self._gloo.send(tensors, peer, tag))

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        return Work(self._gloo.recv(tensors, peer, tag))

    def abort(self) -> None:
        self.num_aborts += 1
        assert self.aborts.wait(DEADLINE_S)


class Work:
    """A work of gloo as one of NCCL: the stream waits for it."""

    error = ""

    def __init__(self, work: Any) -> None:
        self._work = work

    def block_current_stream(self) -> None:
        CURRENT.stream.behind = self

    def over(self) -> bool:
        return not self.error and bool(self._work.wait(timedelta(seconds=DEADLINE_S)))

    def is_completed(self) -> bool:
        return bool(self.error)

    def wait(self, timeout: timedelta) -> None:
        raise RuntimeError(self.error)


CURRENT = threading.local()


@contextlib.contextmanager
def stream(chosen: SimpleNamespace) -> Iterator[None]:
    CURRENT.stream = chosen
    yield


class Event:
    def record(self, stream: SimpleNamespace) -> None:
        self._work = stream.behind

    def query(self) -> bool:
        return self._work.over()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Group]]:
    """Classes of their own, so that a test may change them."""
    made = type("MyGroup", (Group,), {"connects": threading.Event(), "aborts": threading.Event()})
    made.connects.set()
    made.aborts.set()
    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setenv(BLOCKING_WAIT, "user's own")
    yield made
    made.connects.set()
    made.aborts.set()


@contextlib.contextmanager
def joined() -> Iterator[tuple[NcclLink, NcclLink]]:
    with Rendezvous.hosted() as rendezvous, ThreadPoolExecutor(1) as pool:
        other = pool.submit(NcclLink.join, CPU, rendezvous.join(DEADLINE_S), "a 0->1", 1, DEADLINE_S)
        yield NcclLink.join(CPU, rendezvous.join(DEADLINE_S), "a 0->1", 0, DEADLINE_S), other.result(DEADLINE_S)


@pytest.mark.usefixtures("group")
def test_bytes_travel_in_order_over_a_group_that_is_connected_before() -> None:
    with joined() as (sends, receives), ThreadPoolExecutor(1) as pool:
        for batch in range(5):
            payload, place = torch.full((100,), batch, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
            sent = pool.submit(lambda payload=payload: sends.send(payload).synchronize())
            receives.receive(place).synchronize()
            sent.result(DEADLINE_S)
            assert place.unique().tolist() == [batch]
        assert os.environ[BLOCKING_WAIT] == "user's own"


def test_devices_that_do_not_connect_in_time_give_up_and_say_what_to_do(group: type[Group]) -> None:
    group.connects.clear()
    group.__init__ = lambda self, *args: None  # type: ignore[assignment,method-assign]
    with (
        Rendezvous.hosted() as rendezvous,
        pytest.raises(ChannelTimeout, match=r"a 0->1: NCCL did not connect cpu with the receiver's GPU within 0\.05 s"),
    ):
        NcclLink.join(CPU, rendezvous.join(DEADLINE_S), "a 0->1", 0, 0.05)
    group.says = "given up"


def test_what_nccl_refuses_is_told_with_what_to_do(group: type[Group]) -> None:
    group.says = "NCCL error: invalid usage\nDuplicate GPU detected"
    with (
        Rendezvous.hosted() as rendezvous,
        pytest.raises(
            RuntimeError, match=r"a 0->1: .*sender's GPU \(NCCL error: invalid usage Duplicate .*channels gl"
        ),
    ):
        NcclLink.join(CPU, rendezvous.join(DEADLINE_S), "a 0->1", 1, DEADLINE_S)


@pytest.mark.usefixtures("group")
def test_who_waits_for_a_transfer_hears_what_nccl_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_ASK_EVERY_S", 0.01)
    with joined() as (sends, _):
        monkeypatch.setattr(Work, "error", "NCCL error: remote process exited")
        with pytest.raises(PairBroken, match="remote process exited"):
            sends.send(torch.ones(1, dtype=torch.uint8)).synchronize()


def test_a_wire_is_cut_once_and_an_abort_that_hangs_is_not_waited_for(
    group: type[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "_CUT_WITHIN_S", 0.05)
    with joined() as (sends, receives):
        group.aborts.clear()
        sends.cut()
        sends.cut()
        assert sends.is_cut
        assert sends._aborting is not None
        assert sends._aborting.is_alive(), "the other side's abort may be what it waits for"
        receives.cut()
        group.aborts.set()
        for wire in (sends, receives):
            assert wire._aborting is not None
            wire._aborting.join(DEADLINE_S)
            assert wire._group.num_aborts == 1
        with pytest.raises(PairBroken, match="is cut"):
            sends.send(torch.ones(1, dtype=torch.uint8))


def test_a_build_without_nccl_is_known_without_asking_cuda() -> None:
    assert nccl_here() == hasattr(dist, "ProcessGroupNCCL")
