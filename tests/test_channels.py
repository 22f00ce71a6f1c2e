"""What every channel must do, whatever carries it. A new implementation adds one entry to `EDGES`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor

from pipeline.messages import Kind, Message
from workers.bell import Bell
from workers.channel import ChannelClosed, ChannelTimeout, Receiver, Sender
from workers.shm import ShmReceiver, ShmSender, create_ring, new_prefix, unlink_ring

SOON_S = 0.05  # a wait that is meant to end in a timeout
DEADLINE_S = 20.0  # a wait that is meant to succeed
LABEL = "activations 0->1"


class Edge(Protocol):
    """One directed edge: can be pickled, and attached to from any process of this host."""

    def sender(self, receiver_bell: Bell | None = None) -> Sender: ...
    def receiver(self, sender_bell: Bell | None = None) -> Receiver: ...
    def remove(self) -> None: ...


@dataclass(frozen=True)
class ShmEdge:
    name: str

    @classmethod
    def make(cls, slots: int, slot_bytes: int) -> ShmEdge:
        edge = cls(f"{new_prefix()}-a0")
        create_ring(edge.name, slots, slot_bytes)
        return edge

    def sender(self, receiver_bell: Bell | None = None) -> Sender:
        return ShmSender.attach(self.name, label=LABEL, deadline_s=DEADLINE_S, receiver_bell=receiver_bell)

    def receiver(self, sender_bell: Bell | None = None) -> Receiver:
        return ShmReceiver.attach(self.name, label=LABEL, deadline_s=DEADLINE_S, sender_bell=sender_bell)

    def remove(self) -> None:
        unlink_ring(self.name)


EDGES: dict[str, Callable[[int, int], Edge]] = {"shm": ShmEdge.make}


@dataclass
class Workbench:
    """Makes edges and ends and takes them away again."""

    make: Callable[[int, int], Edge]
    stack: ExitStack

    def edge(self, slots: int = 3, slot_bytes: int = 1 << 16) -> Edge:
        edge = self.make(slots, slot_bytes)
        self.stack.callback(edge.remove)
        return edge

    def ends(
        self,
        slots: int = 3,
        slot_bytes: int = 1 << 16,
        sender_bell: Bell | None = None,
        receiver_bell: Bell | None = None,
    ) -> tuple[Sender, Receiver]:
        edge = self.edge(slots, slot_bytes)
        sender = self.stack.enter_context(edge.sender(receiver_bell))
        return sender, self.stack.enter_context(edge.receiver(sender_bell))

    def bell(self) -> Bell:
        bell = self.stack.enter_context(Bell.create(f"{new_prefix()}-b"))
        self.stack.callback(bell.unlink)
        return bell

    def process(self, target: Callable[..., None], *args: object) -> BaseProcess:
        process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
        process.start()
        self.stack.callback(process.join, 10)
        self.stack.callback(process.kill)
        return process


@pytest.fixture(params=list(EDGES))
def bench(request: pytest.FixtureRequest) -> Iterator[Workbench]:
    with ExitStack() as stack:
        yield Workbench(EDGES[request.param], stack)
    assert not list(Path("/dev/shm").glob(f"*fw-{os.getpid()}-*"))


def numbered(batch: int, *tensors: Tensor) -> Message:
    return Message(Kind.ACTIVATION, batch, 0, tensors or (torch.full((4,), float(batch)),))


def assert_same(one: Message, other: Message) -> None:
    assert (one.kind, one.batch, one.stage, one.generation) == (
        other.kind,
        other.batch,
        other.stage,
        other.generation,
    )
    assert [t.dtype for t in one.tensors] == [t.dtype for t in other.tensors]
    assert [t.shape for t in one.tensors] == [t.shape for t in other.tensors]
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def eventually(what: Callable[[], bool]) -> None:
    """For what another implementation learns a moment later (the other end's room, a close)."""
    end = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < end
        os.sched_yield()


def test_messages_come_in_order_more_than_there_are_slots(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=3)
    for batch in range(20):
        sender.send(numbered(batch), DEADLINE_S)
        assert_same(receiver.take_within(DEADLINE_S), numbered(batch))


def test_an_empty_channel_gives_nothing_at_once(bench: Workbench) -> None:
    _, receiver = bench.ends()
    assert receiver.poll() is None
    assert receiver.take() is None
    assert receiver.depth() == 0


PAYLOADS = {
    "none": (),
    "0-dim": (torch.tensor(3.5),),
    "empty": (torch.empty(0, 7), torch.empty(3, 0, dtype=torch.int64)),
    "tiny and odd sizes": (
        torch.tensor([1], dtype=torch.uint8),
        torch.arange(3, dtype=torch.int16),
        torch.ones(5),
    ),
    "bf16, bool, int64": (
        torch.randn(8, 3).bfloat16(),
        torch.tensor([[True, False], [False, True]]),
        torch.tensor([-(2**62), 2**62]),
    ),
    "halves and doubles": (
        torch.randn(5).half(),
        torch.randn(2, 2).double(),
        torch.tensor([-1], dtype=torch.int8),
    ),
    "not contiguous": (torch.arange(12.0).view(3, 4).t(),),
    "many dimensions": (torch.randn(2, 1, 3, 1, 2),),
    "part of a graph": (torch.ones(3, requires_grad=True) * 2,),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_payload_arrives_equal(bench: Workbench, name: str) -> None:
    sender, receiver = bench.ends()
    message = Message(Kind.GRADIENT, 2**40, 7, PAYLOADS[name], generation=9)
    for _ in range(4):  # slots are used again
        sender.send(message, DEADLINE_S)
        arrived = receiver.take_within(DEADLINE_S)
        assert_same(arrived, message)
        assert not any(tensor.requires_grad for tensor in arrived.tensors)


def test_shapes_kinds_and_dtypes_may_change_from_message_to_message(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=2)
    payloads = list(PAYLOADS.values())
    for batch in range(4 * len(payloads)):
        message = Message(Kind(1 + batch % 5), batch, 1, payloads[batch // 3 % len(payloads)])
        sender.send(message, DEADLINE_S)
        assert_same(receiver.take_within(DEADLINE_S), message)


def test_messages_of_an_evaluation_and_of_training_share_a_channel(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=1)
    for batch in range(4):
        with torch.inference_mode(batch % 2 == 0):
            sender.send(numbered(batch, torch.full((3,), float(batch))), DEADLINE_S)
        with torch.inference_mode(batch % 3 == 0):
            arrived = receiver.take_within(DEADLINE_S).tensors[0]
        assert arrived.tolist() == [batch] * 3
        if batch % 3:
            weight = torch.ones(3, requires_grad=True)
            assert torch.autograd.grad((weight * arrived).sum(), weight)[0].tolist() == [batch] * 3


def test_a_big_message(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=2, slot_bytes=(16 << 20) + 128)
    message = numbered(0, torch.randn(4 << 20))
    sender.send(message, DEADLINE_S)
    assert_same(receiver.take_within(DEADLINE_S), message)


def test_a_sent_tensor_may_be_changed_at_once(bench: Workbench) -> None:
    sender, receiver = bench.ends()
    tensor = torch.zeros(3)
    sender.send(numbered(0, tensor), DEADLINE_S)
    tensor.fill_(1)
    assert torch.equal(receiver.take_within(DEADLINE_S).tensors[0], torch.zeros(3))


def test_a_full_channel_refuses_within_the_deadline_and_says_who_waited_for_whom(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=3)
    for batch in range(3):
        assert sender.room()
        sender.send(numbered(batch), DEADLINE_S)
    assert not sender.room()
    assert sender.depth() == sender.capacity == 3
    start = time.monotonic()
    with pytest.raises(ChannelTimeout, match=r"activations 0->1: the sender waited 0\.05 s .*receiver.*3/3 slots full"):
        sender.send(numbered(3), SOON_S)
    assert SOON_S <= time.monotonic() - start < DEADLINE_S
    assert receiver.take_within(DEADLINE_S).batch == 0
    sender.send(numbered(3), DEADLINE_S)  # the timeout lost nothing and left nothing half done
    assert [receiver.take_within(DEADLINE_S).batch for _ in range(3)] == [1, 2, 3]


def test_an_empty_channel_gives_up_at_the_deadline(bench: Workbench) -> None:
    _, receiver = bench.ends()
    with pytest.raises(ChannelTimeout, match=r"activations 0->1: the receiver waited 0\.05 s .*sender.*0/3 slots full"):
        receiver.receive(SOON_S)
    with pytest.raises(ChannelTimeout):
        receiver.take_within(0)


def test_what_is_read_in_place_keeps_its_slot_until_released_oldest_first(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=2)
    sender.send(numbered(0), DEADLINE_S)
    sender.send(numbered(1), DEADLINE_S)
    first, second = receiver.receive(DEADLINE_S), receiver.receive(DEADLINE_S)
    assert receiver.held == 2
    assert not sender.room()
    with pytest.raises(RuntimeError, match="held in place"):
        receiver.take()
    receiver.release()
    sender.send(numbered(2), DEADLINE_S)  # into the slot of the first
    assert_same(second, numbered(1))
    assert (first.batch, second.batch) == (0, 1)
    receiver.release()
    with pytest.raises(RuntimeError, match="nothing to release"):
        receiver.release()
    assert_same(receiver.take_within(DEADLINE_S), numbered(2))


def test_what_is_taken_stays_when_its_slot_is_used_again(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=1)
    sender.send(numbered(0), DEADLINE_S)
    taken = receiver.take_within(DEADLINE_S)
    sender.send(numbered(1), DEADLINE_S)
    assert_same(taken, numbered(0))
    assert receiver.take_within(DEADLINE_S).tensors[0].requires_grad_().is_leaf


def test_a_message_larger_than_its_slot_is_refused_and_the_channel_goes_on(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=1, slot_bytes=256)
    with pytest.raises(ValueError, match="does not fit its slot"):
        sender.send(numbered(0, torch.zeros(1000)), DEADLINE_S)
    sender.send(numbered(1), DEADLINE_S)
    assert_same(receiver.take_within(DEADLINE_S), numbered(1))


def test_the_receiver_gets_what_was_sent_before_the_sender_closed(bench: Workbench) -> None:
    sender, receiver = bench.ends()
    sender.send(numbered(0), DEADLINE_S)
    sender.send(numbered(1), DEADLINE_S)
    sender.close()
    sender.close()
    assert [receiver.take_within(DEADLINE_S).batch for _ in range(2)] == [0, 1]
    for _ in range(2):
        with pytest.raises(ChannelClosed, match="activations 0->1: closed by the sender"):
            receiver.receive(DEADLINE_S)
        with pytest.raises(ChannelClosed):
            receiver.poll()
    with pytest.raises(ChannelClosed):
        sender.send(numbered(2), DEADLINE_S)


@pytest.mark.parametrize("num_sent", [0, 1, 3])
def test_the_sender_learns_that_the_receiver_closed(bench: Workbench, num_sent: int) -> None:
    sender, receiver = bench.ends(slots=3)
    for batch in range(num_sent):
        sender.send(numbered(batch), DEADLINE_S)
    receiver.close()
    receiver.close()
    eventually(sender.room)  # a send would not block: it raises
    for _ in range(5):
        with pytest.raises(ChannelClosed, match="activations 0->1: closed by the receiver"):
            sender.send(numbered(9), DEADLINE_S)
    with pytest.raises(ChannelClosed):
        receiver.poll()


def test_closing_wakes_a_blocked_peer(bench: Workbench) -> None:
    (sender, full), (empty, receiver) = bench.ends(slots=1), bench.ends()
    sender.send(numbered(0), DEADLINE_S)
    with ThreadPoolExecutor(2) as pool:
        sending = pool.submit(sender.send, numbered(1), DEADLINE_S)
        receiving = pool.submit(receiver.receive, DEADLINE_S)
        full.close()
        empty.close()
        with pytest.raises(ChannelClosed):
            sending.result(DEADLINE_S)
        with pytest.raises(ChannelClosed):
            receiving.result(DEADLINE_S)


def test_a_blocked_sender_goes_on_when_a_slot_is_released(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=1)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: [sender.send(numbered(batch), DEADLINE_S) for batch in range(200)])
        assert [receiver.take_within(DEADLINE_S).batch for _ in range(200)] == list(range(200))
        done.result(DEADLINE_S)


def test_tensors_read_in_place_outlive_the_end(bench: Workbench) -> None:
    sender, receiver = bench.ends()
    sender.send(numbered(5), DEADLINE_S)
    message = receiver.receive(DEADLINE_S)
    receiver.close()
    sender.close()
    assert_same(message, numbered(5))
    receiver.release()
    assert receiver.depth() == 0


def test_bells_ring_after_send_after_release_and_at_close(bench: Workbench) -> None:
    senders, receivers = bench.bell(), bench.bell()
    sender, receiver = bench.ends(sender_bell=senders, receiver_bell=receivers)
    sender.send(numbered(0), DEADLINE_S)
    assert receivers.wait(DEADLINE_S)
    receivers.clear()
    message = receiver.poll()
    assert message is not None
    assert not senders.wait(0)
    receiver.release()
    assert senders.wait(DEADLINE_S)
    sender.close()
    assert receivers.wait(DEADLINE_S)
    receiver.close()
    assert senders.wait(DEADLINE_S)


def test_with_bells_no_message_is_missed(bench: Workbench) -> None:
    bell = bench.bell()
    sender, receiver = bench.ends(slots=2, receiver_bell=bell)
    got: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: [sender.send(numbered(batch), DEADLINE_S) for batch in range(300)])
        while len(got) < 300:
            bell.clear()
            message = receiver.take()
            if message is not None:
                got.append(message.batch)
            else:
                assert bell.wait(DEADLINE_S)
        done.result(DEADLINE_S)
    assert got == list(range(300))


def test_a_bell_remembers_rings_until_they_are_cleared(bench: Workbench) -> None:
    bell = bench.bell()
    assert not bell.wait(0)
    bell.ring()
    bell.ring()
    assert bell.wait(0)
    assert bell.wait(0)
    assert not bell.wait(SOON_S)
    bell.ring()
    bell.clear()
    assert not bell.wait(0)
    with Bell.attach(bell.name, DEADLINE_S) as other:
        other.ring()
    other.ring()  # closed: nothing
    assert bell.wait(DEADLINE_S)
    with pytest.raises(FileExistsError):
        Bell.create(bell.name)
    with pytest.raises(TimeoutError, match="no semaphore"):
        Bell.attach(f"{bell.name}-no", 0)


def test_a_signal_does_not_end_a_wait_but_ctrl_c_does(bench: Workbench) -> None:
    bell = bench.bell()
    calls: list[int] = []
    waker = threading.main_thread().ident
    assert waker is not None
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, SOON_S / 4, SOON_S / 4)
        start = time.monotonic()
        assert not bell.wait(SOON_S)
        assert calls
        assert time.monotonic() - start >= SOON_S
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            bell.wait(DEADLINE_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _echo_and_hang(there: Edge, back: Edge, count: int) -> None:
    torch.set_num_threads(1)
    with there.receiver() as receiver, back.sender() as sender:
        for _ in range(count):
            sender.send(receiver.receive(DEADLINE_S), DEADLINE_S)
            receiver.release()
        receiver.receive(DEADLINE_S)  # held, never released
        sender.send(numbered(-1), DEADLINE_S)
        receiver.receive(DEADLINE_S)


@pytest.mark.processes
def test_a_spawned_process_attaches_by_name_and_when_it_is_killed_waits_end_in_time(bench: Workbench) -> None:
    there, back = bench.edge(slots=2), bench.edge(slots=2)
    messages = [Message(Kind.ACTIVATION, batch, 0, payload) for batch, payload in enumerate(PAYLOADS.values())]
    process = bench.process(_echo_and_hang, there, back, len(messages))
    with there.sender() as sender, back.receiver() as receiver:
        for message in messages:
            sender.send(message, DEADLINE_S)
            assert_same(receiver.take_within(DEADLINE_S), message)
        sender.send(numbered(100), DEADLINE_S)
        assert receiver.take_within(DEADLINE_S).batch == -1
        process.kill()
        process.join(DEADLINE_S)
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(ChannelTimeout, match="0/2 slots full"):
            receiver.receive(SOON_S)
        sender.send(numbered(101), DEADLINE_S)
        with pytest.raises(ChannelTimeout, match="2/2 slots full"):
            sender.send(numbered(102), SOON_S)
