"""What every channel must do, whatever carries it. A new implementation adds one entry to `CHANNELS`.

Channels of GPUs run here twice: on the CPU, with a device that does nothing before somebody waits for it, and on a GPU.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import late_device
import pytest
import torch
from torch import Tensor

from pipeline.messages.bundle import Bundle, Item
from pipeline.messages.message import Kind, Message
from pipeline.plan.device_choice import CPU
from pipeline.plan.topology import Edge
from workers.channels.errors import ChannelBroken, ChannelClosed, ChannelTimeout
from workers.channels.interface import Receiver, Sender
from workers.channels.net.gloo import Meeting, Rendezvous
from workers.channels.shm.ring import create_ring, new_prefix, unlink_ring
from workers.channels.wakeup import WakeUp, unlink_semaphore
from workers.processes.context import process_context
from workers.wiring.edges import ChannelSpec, open_receiver, open_sender, ring_slot_bytes

SOON_S = 0.05  # a wait that is meant to end in a timeout
DEADLINE_S = 20.0  # a wait that is meant to succeed
LABEL = "activations 0->1"


@dataclass(frozen=True)
class Bells:
    """One of each end's worker."""

    sender: WakeUp | None = None
    receiver: WakeUp | None = None

    def of(self, stage: int) -> WakeUp | None:
        return (self.sender, self.receiver)[stage]


NO_BELLS = Bells()


@dataclass(frozen=True)
class Ground:
    """One directed edge from stage 0 to stage 1: can be pickled, and opened in any process of this host."""

    edge: ChannelSpec
    rendezvous: Rendezvous | None = None

    def sender(self, bells: Bells = NO_BELLS) -> Sender:
        late_device.register()
        return open_sender(self.edge, bells.of, self._meeting(), DEADLINE_S)

    def receiver(self, bells: Bells = NO_BELLS) -> Receiver:
        late_device.register()
        return open_receiver(self.edge, bells.of, self._meeting(), DEADLINE_S)

    def _meeting(self) -> Meeting | None:
        return None if self.rendezvous is None else self.rendezvous.join(DEADLINE_S)


@contextmanager
def over_shared_memory(edge: ChannelSpec) -> Iterator[Ground]:
    size = ring_slot_bytes(edge)
    assert size is not None
    create_ring(edge.name, edge.slots, size)
    try:
        yield Ground(edge)
    finally:
        unlink_ring(edge.name)


@contextmanager
def over_gloo(edge: ChannelSpec) -> Iterator[Ground]:
    with Rendezvous.hosted() as rendezvous:
        yield Ground(edge, rendezvous)


@dataclass(frozen=True)
class Implementation:
    """One implementation.

    Attributes:
        ground: makes what an edge needs.
        sees_death: what a wait raises whose other end was killed; shared memory only has its deadlines.
        kind: of the edge.
        device: where the sender has its tensors.
        other: where the receiver has; None: there too.
    """

    ground: Callable[[ChannelSpec], AbstractContextManager[Ground]]
    sees_death: type[Exception]
    kind: str
    device: str = CPU
    other: str | None = None


CHANNELS = {
    "shm": Implementation(over_shared_memory, ChannelTimeout, "shm"),
    "gloo": Implementation(over_gloo, ChannelBroken, "gloo"),
    "shm, late device": Implementation(over_shared_memory, ChannelTimeout, "shm", late_device.DEVICE),
    "gloo, late device": Implementation(over_gloo, ChannelBroken, "gloo", late_device.DEVICE),
    "peer memory, late device": Implementation(over_shared_memory, ChannelTimeout, "cuda", late_device.DEVICE),
    "wire, late device": Implementation(over_gloo, ChannelBroken, "nccl", late_device.DEVICE),
    "shm, GPU": Implementation(over_shared_memory, ChannelTimeout, "shm", "cuda:0"),
    "gloo, GPU": Implementation(over_gloo, ChannelBroken, "gloo", "cuda:0"),
    "peer memory, GPU": Implementation(over_shared_memory, ChannelTimeout, "cuda", "cuda:0"),
    "NCCL, two GPUs": Implementation(over_gloo, ChannelBroken, "nccl", "cuda:0", "cuda:1"),
}


def _needs(how: Implementation) -> list[pytest.MarkDecorator]:
    gpus = {device for device in (how.device, how.other) if device and device.startswith("cuda")}
    return [pytest.mark.gpu(len(gpus))] if gpus else []


KINDS = [pytest.param(name, marks=_needs(how)) for name, how in CHANNELS.items()]


@dataclass
class Workbench:
    """Makes edges and ends and takes them away again."""

    kind: str
    stack: ExitStack

    def edge(
        self,
        slots: int = 3,
        slot_bytes: int = 1 << 16,
        wire_dtype: torch.dtype | None = None,
        label: str = LABEL,
        generation: int = 0,
    ) -> Ground:
        how, name = CHANNELS[self.kind], f"{new_prefix()}-a0"
        devices = how.device, how.other or how.device
        between = Edge(0, 1, "activations", 0)
        edge = ChannelSpec(between, how.kind, name, label, slots, slot_bytes, wire_dtype, *devices, generation)
        return self.stack.enter_context(how.ground(edge))

    def ends(
        self,
        slots: int = 3,
        slot_bytes: int = 1 << 16,
        bells: Bells = NO_BELLS,
        wire_dtype: torch.dtype | None = None,
        generation: int = 0,
    ) -> tuple[Sender, Receiver]:
        ground = self.edge(slots, slot_bytes, wire_dtype, generation=generation)
        with ThreadPoolExecutor(1) as pool:  # each end may wait for the other
            receiver = pool.submit(ground.receiver, bells)
            sender = self.stack.enter_context(ground.sender(bells))
            return sender, self.stack.enter_context(receiver.result(DEADLINE_S))

    def bell(self) -> WakeUp:
        bell = self.stack.enter_context(WakeUp.create(f"{new_prefix()}-b"))
        self.stack.callback(unlink_semaphore, bell.name)
        return bell

    def process(self, target: Callable[..., None], *args: object) -> BaseProcess:
        process = process_context().Process(target=target, args=args, daemon=True)
        process.start()
        self.stack.callback(process.join, 10)
        self.stack.callback(process.kill)
        return process


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest) -> Iterator[Workbench]:
    threads = set(threading.enumerate())
    with ExitStack() as stack:
        yield Workbench(request.param, stack)
    assert set(threading.enumerate()) <= threads
    assert not list(Path("/dev/shm").glob(f"*fw-{os.getpid()}-*"))


def numbered(batch: int, *tensors: Tensor) -> Message:
    return Message(Kind.ACTIVATION, Item(batch), 0, tensors or (torch.full((4,), float(batch)),))


def assert_same(one: Message, other: Message) -> None:
    assert (one.kind, one.item, one.stage) == (other.kind, other.item, other.stage)
    assert [len(one.payload), len(one.context)] == [len(other.payload), len(other.context)]
    assert [t is None for t in one.payload] == [t is None for t in other.payload]
    assert [t.dtype for t in one.tensors] == [t.dtype for t in other.tensors]
    assert [t.shape for t in one.tensors] == [t.shape for t in other.tensors]
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.tensors, other.tensors, strict=True))


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


PAYLOADS: dict[str, Bundle] = {
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
    "a place without one": (torch.ones(2), None, torch.arange(3)),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_payload_arrives_equal(bench: Workbench, name: str) -> None:
    sender, receiver = bench.ends()
    message = Message(Kind.GRADIENT, Item(2**40), 7, PAYLOADS[name], PAYLOADS[name][:1])
    for _ in range(4):  # slots are used again
        sender.send(message, DEADLINE_S)
        arrived = receiver.take_within(DEADLINE_S)
        assert_same(arrived, message)
        assert not any(tensor.requires_grad for tensor in arrived.tensors)


def test_shapes_kinds_and_dtypes_may_change_from_message_to_message(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=2)
    payloads = list(PAYLOADS.values())
    for batch in range(4 * len(payloads)):
        message = Message(Kind(1 + batch % 5), Item(batch), 1, payloads[batch // 3 % len(payloads)])
        sender.send(message, DEADLINE_S)
        assert_same(receiver.take_within(DEADLINE_S), message)


def test_messages_of_an_evaluation_and_of_training_share_a_channel(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=1)
    for batch in range(4):
        with torch.inference_mode(batch % 2 == 0):
            sender.send(numbered(batch, torch.full((3,), float(batch))), DEADLINE_S)
        with torch.inference_mode(batch % 3 == 0):
            arrived = receiver.take_within(DEADLINE_S).tensors[0].cpu()
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
    assert torch.equal(receiver.take_within(DEADLINE_S).tensors[0].cpu(), torch.zeros(3))


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
    sender, receiver = bench.ends(bells=Bells(senders, receivers))
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
    sender, receiver = bench.ends(slots=2, bells=Bells(receiver=bell))
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
    with WakeUp.attach(bell.name, DEADLINE_S) as other:
        other.ring()
    other.ring()  # closed: nothing
    assert bell.wait(DEADLINE_S)
    with pytest.raises(FileExistsError):
        WakeUp.create(bell.name)
    with pytest.raises(TimeoutError, match="no semaphore"):
        WakeUp.attach(f"{bell.name}-no", 0)


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
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            _interrupted(bell)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupted(bell: WakeUp) -> None:
    """A wait that a signal ends, once: a second one would hit whoever catches the first."""
    signal.setitimer(signal.ITIMER_REAL, SOON_S / 4)
    bell.wait(DEADLINE_S)


def _echo_and_hang(there: Ground, back: Ground, count: int) -> None:
    torch.set_num_threads(1)
    with there.receiver() as receiver, back.sender() as sender:
        for _ in range(count):
            sender.send(receiver.receive(DEADLINE_S), DEADLINE_S)
            receiver.release()
        receiver.receive(DEADLINE_S)  # held, never released, like the next
        sender.send(numbered(-1), DEADLINE_S)
        receiver.receive(DEADLINE_S)
        receiver.receive(DEADLINE_S)  # until it is killed


@pytest.mark.processes
def test_a_spawned_process_attaches_by_name_and_when_it_is_killed_waits_end_in_time(bench: Workbench) -> None:
    there, back = bench.edge(slots=2), bench.edge(slots=2, label="gradients 1->0")
    messages = [Message(Kind.ACTIVATION, Item(batch), 0, payload) for batch, payload in enumerate(PAYLOADS.values())]
    process = bench.process(_echo_and_hang, there, back, len(messages))
    with there.sender() as there_end, back.receiver() as back_end:
        for message in messages:
            there_end.send(message, DEADLINE_S)
            assert_same(back_end.take_within(DEADLINE_S), message)
        there_end.send(numbered(100), DEADLINE_S)
        assert back_end.take_within(DEADLINE_S).batch == -1
        there_end.send(numbered(101), DEADLINE_S)
        eventually(lambda: there_end.depth() == 2)
        process.kill()
        process.join(DEADLINE_S)
        assert process.exitcode == -signal.SIGKILL
        start = time.monotonic()
        with pytest.raises(CHANNELS[bench.kind].sees_death, match=r"gradients 1->0: .*the receiver waited.*0/2 slots"):
            back_end.receive(3.0)
        with pytest.raises(CHANNELS[bench.kind].sees_death, match=r"activations 0->1: .*the sender waited.*2/2 slots"):
            there_end.send(numbered(102), 1.0)
        assert time.monotonic() - start < DEADLINE_S


def _hold(ground: Ground, sends: bool) -> None:
    """Take part in a channel, then do nothing, until killed."""
    torch.set_num_threads(1)
    with ground.sender() if sends else ground.receiver() as end:
        if isinstance(end, Sender):
            end.send(numbered(7), DEADLINE_S)
        threading.Event().wait(2 * DEADLINE_S)


@pytest.mark.processes
@pytest.mark.parametrize("sends", [True, False], ids=["sender", "receiver"])
def test_a_stopped_peer_costs_the_deadline_and_closing_ends_in_time(bench: Workbench, sends: bool) -> None:
    """SIGSTOP: the connection stands, nothing is heard, and only our own deadlines help."""
    ground = bench.edge(slots=1)
    process = bench.process(_hold, ground, sends)
    end = bench.stack.enter_context(ground.receiver() if sends else ground.sender())
    if isinstance(end, Receiver):
        assert end.take_within(DEADLINE_S).batch == 7
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    if isinstance(end, Receiver):
        with pytest.raises(ChannelTimeout, match="the receiver waited"):
            end.receive(SOON_S)
    else:
        end.send(numbered(0), DEADLINE_S)
        with pytest.raises(ChannelTimeout, match="the sender waited"):
            end.send(numbered(1), SOON_S)
    end.close()
    assert time.monotonic() - start < DEADLINE_S


@pytest.mark.processes
def test_both_directions_carry_big_messages_at_once(bench: Workbench) -> None:
    there, back = bench.edge(slots=2, slot_bytes=1 << 22), bench.edge(slots=2, slot_bytes=1 << 22)
    bench.process(_flood, there, back, 20)
    with there.sender() as sender, back.receiver() as receiver:
        _exchange(sender, receiver, 20)


def _flood(there: Ground, back: Ground, count: int) -> None:
    torch.set_num_threads(1)
    with there.receiver() as receiver, back.sender() as sender:
        _exchange(sender, receiver, count)


def _exchange(sender: Sender, receiver: Receiver, count: int) -> None:
    """Send and receive 2 MiB messages, each side as fast as it can, from one thread, as a worker does."""
    num_sent = num_received = 0
    end = time.monotonic() + DEADLINE_S
    while num_received < count or num_sent < count:
        assert time.monotonic() < end
        if num_sent < count and sender.room():
            sender.send(numbered(num_sent, torch.full((1 << 19,), float(num_sent))), 0)
            num_sent += 1
        message = receiver.take() if num_received < count else None
        if message is None:
            os.sched_yield()
        else:
            assert_same(message, numbered(num_received, torch.full((1 << 19,), float(num_received))))
            num_received += 1


def test_the_end_of_a_run_travels_like_any_message_and_the_sender_may_close_behind_it(bench: Workbench) -> None:
    sender, receiver = bench.ends()
    sender.send(numbered(0), DEADLINE_S)
    sender.send(Message(Kind.END, Item(1), 0), DEADLINE_S)
    sender.close()
    assert [receiver.take_within(DEADLINE_S).kind for _ in range(2)] == [Kind.ACTIVATION, Kind.END]
    with pytest.raises(ChannelClosed):
        receiver.take()


def test_a_full_channel_closes_and_keeps_what_was_sent(bench: Workbench) -> None:
    """The word that nothing follows needs no slot of its own kind: neither side waits for room."""
    sender, receiver = bench.ends(slots=2)
    for batch in range(5):
        sender.send(numbered(batch), DEADLINE_S)
        if batch < 3:
            receiver.take_within(DEADLINE_S)
    start = time.monotonic()
    sender.close()
    assert time.monotonic() - start < DEADLINE_S / 2
    assert [receiver.take_within(DEADLINE_S).batch for _ in range(2)] == [3, 4]
    with pytest.raises(ChannelClosed):
        receiver.take()


def test_a_wire_dtype_rounds_the_payload_and_leaves_the_context_alone(bench: Workbench) -> None:
    sender, receiver = bench.ends(slots=2, slot_bytes=320, wire_dtype=torch.bfloat16)
    h, labels = torch.randn(3, 32), torch.randn(3)  # in float32 they take 512 bytes
    for batch in range(5):
        message = Message(Kind.ACTIVATION, Item(batch), 0, (h + batch, None), (labels,))
        sender.send(message, DEADLINE_S)
        arrived = receiver.take_within(DEADLINE_S)
        assert_same(arrived, replace(message, payload=((h + batch).bfloat16().float(), None)))
    for payload in ((torch.randn(4).bfloat16(), labels), (torch.randn(4).double(),), (torch.tensor([3]),), ()):
        message = Message(Kind.GRADIENT, Item(9), 1, payload)
        sender.send(message, DEADLINE_S)
        assert_same(receiver.take_within(DEADLINE_S), message)


def test_an_end_of_another_generation_is_told_from_one_of_this(bench: Workbench) -> None:
    """What a worker from before a restart still sends must not be taken for a message of the new ones."""
    sender, receiver = bench.ends(generation=2)
    sender.send(replace(numbered(0), generation=7), DEADLINE_S)
    assert receiver.take_within(DEADLINE_S).generation == 2, "the end that sends says which it is of"
    sender.generation = 1
    sender.send(numbered(5), DEADLINE_S)
    said = r"activations 0->1: got a message of generation 1 \(batch 5\), and this end is of generation 2"
    with pytest.raises(ChannelBroken, match=said):
        receiver.receive(DEADLINE_S)
