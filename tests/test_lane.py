"""Channels of devices: nobody is told of bytes that are not there yet, and no slot is written while it is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import late_device
import numpy as np
import pytest
import torch

from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message
from pipeline.metrics.spans import SPAN_DTYPE, Span, Spans
from pipeline.plan.topology import Edge
from workers.channels.errors import ChannelBroken, ChannelTimeout
from workers.channels.interface import Receiver, Sender
from workers.channels.shm.ring import create_ring, new_prefix, unlink_ring
from workers.channels.staging import DeviceStaging, StagedSlot
from workers.clock import now_ns
from workers.telemetry.gpu_span_recorder import GpuSpanRecorder
from workers.telemetry.status_table import StatusTable
from workers.wiring.edges import ChannelSpec, open_receiver, open_sender, ring_slot_bytes

DEADLINE_S = 20.0


@contextmanager
def standstill() -> Iterator[None]:
    late_device.STANDSTILL.set()
    try:
        yield
    finally:
        late_device.STANDSTILL.clear()


@pytest.fixture(params=["shm", "cuda"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Sender, Receiver]]:
    late_device.register()
    device = late_device.DEVICE
    edge = ChannelSpec(
        Edge(0, 1, "activations", 0), request.param, f"{new_prefix()}-a", "a 0->1", 2, 4096, None, device, device
    )
    size = ring_slot_bytes(edge)
    assert size is not None
    create_ring(edge.name, edge.slots, size)
    with ExitStack() as stack:
        stack.callback(unlink_ring, edge.name)
        receiver = stack.enter_context(open_receiver(edge, lambda stage: None, None, DEADLINE_S))
        sender = stack.enter_context(open_sender(edge, lambda stage: None, None, DEADLINE_S))
        yield sender, receiver


def numbered(batch: int) -> Message:
    return Message(Kind.ACTIVATION, Item(batch), 0, (torch.full((300,), float(batch)), torch.tensor([batch])))


def test_a_message_is_there_when_its_bytes_are_and_no_sooner(ends: tuple[Sender, Receiver]) -> None:
    sender, receiver = ends
    with standstill():
        tensors = numbered(1).tensors
        sender.send(Message(Kind.ACTIVATION, Item(1), 0, tensors), DEADLINE_S)
        sender.send(Message(Kind.END, Item(2), 0), DEADLINE_S)  # nothing of it is copied, but it stays behind
        tensors[0].fill_(9.0)  # the snapshot is taken
        assert receiver.poll() is None
        assert sender.depth() == 2
        with pytest.raises(ChannelTimeout, match="the sender waited"):
            sender.send(numbered(3), 0.02)
    first = receiver.take_within(DEADLINE_S)
    assert (first.batch, first.tensors[0].unique().tolist(), first.tensors[1].tolist()) == (1, [1.0], [1])
    assert receiver.take_within(DEADLINE_S).kind is Kind.END


def test_a_slot_is_written_again_only_when_it_was_read(ends: tuple[Sender, Receiver]) -> None:
    """The receiver's device has not yet copied message 0 when its slot is given back and message 2 comes into it."""
    sender, receiver = ends
    for batch in (0, 1):
        sender.send(numbered(batch), DEADLINE_S)
    receiver.receive(DEADLINE_S)  # both are posted then, in order
    receiver.release()
    held = receiver.receive(DEADLINE_S)
    receiver.release()
    sender.send(numbered(2), DEADLINE_S)
    third = receiver.receive(DEADLINE_S)
    with standstill():
        receiver.release()
        sending = threading.Thread(target=lambda: [sender.send(numbered(batch), DEADLINE_S) for batch in (3, 4)])
        sending.start()
    sending.join(DEADLINE_S)
    assert not sending.is_alive()
    assert held.tensors[0].unique().tolist() == [1.0]
    assert third.tensors[0].unique().tolist() == [2.0]
    with standstill():
        assert receiver.depth() == 2
    assert [receiver.take_within(DEADLINE_S).tensors[0].unique().tolist() for _ in (3, 4)] == [[3.0], [4.0]]


def test_what_is_fetched_late_is_what_was_sent(ends: tuple[Sender, Receiver]) -> None:
    """The device of the receiver does nothing while the sender fills every slot it believes to be free."""
    sender, receiver = ends
    sender.send(numbered(5), DEADLINE_S)
    receiver.receive(DEADLINE_S)
    receiver.release()
    for batch in (0, 1):
        sender.send(numbered(batch), DEADLINE_S)
    second = None
    while second is None:  # both are posted when the second can be seen; the first is held in place until then
        first = receiver.receive(DEADLINE_S)
        second = receiver.receive(DEADLINE_S)
    receiver.release()
    receiver.release()
    sending = threading.Thread(target=lambda: [sender.send(numbered(batch), DEADLINE_S) for batch in (2, 3)])
    sending.start()
    sending.join(DEADLINE_S)
    assert [message.tensors[1].item() for message in (first, second)] == [0, 1]
    assert [receiver.take_within(DEADLINE_S).tensors[1].item() for _ in (2, 3)] == [2, 3]


def test_the_worker_turns_to_receiving_before_it_waits_for_a_copy(ends: tuple[Sender, Receiver]) -> None:
    """On a GPU the wait would be booked to whatever came before."""
    sender, receiver = ends
    told: list[tuple[int, int]] = []
    assert receiver.staging is not None
    engine = receiver.staging.engine
    fetch = engine.fetch
    engine.fetch = lambda tensors: told.append((-1, len(tensors))) or fetch(tensors)  # type: ignore[method-assign]
    receiver.staging.before_landing = lambda batch: told.append((batch, 0))
    for batch in (7, 8):
        sender.send(numbered(batch), DEADLINE_S)
        assert receiver.take_within(DEADLINE_S).batch == batch
    assert told == [(7, 0), (-1, 2), (8, 0), (-1, 2)]


class _Broken(late_device.LateEngine):
    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        self._todo.append(_fail)


def _fail() -> None:
    raise RuntimeError("an illegal memory access was encountered")


def test_a_copy_that_fails_is_told_by_the_next_send_and_its_message_never_arrives() -> None:
    lane = DeviceStaging(_Broken("late:0"), "activations 0->1")
    posted: list[int] = []
    slot = StagedSlot(memoryview(bytearray(4096)), None, lane)
    slot.write(numbered(0))
    told = threading.Event()
    lane.then(lambda: posted.append(0))
    lane.then(told.set)
    assert told.wait(DEADLINE_S)
    with pytest.raises(
        ChannelBroken, match=r"activations 0->1: a copy of an earlier message failed: an illegal memory"
    ):
        slot.write(numbered(1))
    lane.close()
    assert posted == []
    lane.then(lambda: posted.append(1))
    assert posted == [1], "closed, it calls at once"


def test_a_peer_whose_receiver_does_not_come_gives_up_and_leaves_nothing() -> None:
    name, threads = f"{new_prefix()}-a", set(threading.enumerate())
    create_ring(name, 2, 1024)
    late_device.register()
    device = late_device.DEVICE
    edge = ChannelSpec(Edge(0, 1, "activations", 0), "cuda", name, "a 0->1", 2, 64, None, device, device)
    try:
        with pytest.raises(
            ChannelTimeout, match=r"a 0->1: the receiver has not offered memory of its device within 0.05"
        ):
            open_sender(edge, lambda stage: None, None, 0.05)
    finally:
        unlink_ring(name)
    assert set(threading.enumerate()) <= threads


class _Device:
    """Comes to every mark 5 us after the last one, however the host hurries."""

    def __init__(self) -> None:
        self.marks = self.now_ns = self.readings = 0

    def mark(self) -> None:
        self.marks += 1

    def times_ns(self) -> list[int]:
        self.readings += 1
        begin, self.now_ns, self.marks = self.now_ns, self.now_ns + 5_000 * self.marks, 0
        return list(range(begin, self.now_ns, 5_000))


def test_spans_on_a_gpu_have_the_times_of_the_device(tmp_path: Path) -> None:
    """The board has the host's. Both tests of it once failed on a host that had been up for less than 1,000 s."""
    begin_ns = now_ns()
    name, device = f"{new_prefix()}-s", _Device()
    board = StatusTable(name, 1, create=True)
    try:
        record = GpuSpanRecorder(0, board, tmp_path / "spans.npy", device)
        for batch in range(20_000):  # more than one piece of memory
            record(Span.FORWARD, batch)
        assert board.read(0).start_ns >= begin_ns, "the board has the host's clock"
        record.close()
    finally:
        StatusTable.unlink_name(name)
        board.close()
    spans = np.load(tmp_path / "spans.npy", allow_pickle=False)
    assert spans.dtype == SPAN_DTYPE
    assert spans["start_ns"].tolist() == list(range(0, 5_000 * 20_001, 5_000))
    assert device.readings == 2
    assert Spans(spans).seconds(Span.FORWARD) == pytest.approx(0.1)


def test_a_device_that_failed_leaves_the_times_of_the_host(tmp_path: Path) -> None:
    class Lost(_Device):
        def times_ns(self) -> list[int]:
            raise RuntimeError("CUDA error: unspecified launch failure")

    begin_ns = now_ns()
    name = f"{new_prefix()}-s"
    board = StatusTable(name, 1, create=True)
    try:
        record = GpuSpanRecorder(0, board, tmp_path / "spans.npy", Lost())
        record(Span.FORWARD, 0)
        record.close()
    finally:
        StatusTable.unlink_name(name)
        board.close()
    assert np.load(tmp_path / "spans.npy", allow_pickle=False)["start_ns"].min() >= begin_ns
