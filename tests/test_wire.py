"""Headers over gloo, payloads over a wire: nothing is queued that may never come, and nobody sees half a message."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import late_device
import pytest
import torch
import wired
from late_device import LateLink, wires_down
from oracle import assert_same

from launch import RunFailed
from launch.results.result import Result
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import ChannelPlan, Plan, Recipe, run_reference
from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message
from pipeline.plan.channel_choice import ChannelChoice
from pipeline.plan.topology import Edge
from workers.channels.errors import ChannelBroken, ChannelClosed, ChannelTimeout
from workers.channels.gpu.nccl_ends import NcclReceiver, NcclSender
from workers.channels.net import credit_end
from workers.channels.net.gloo import PairBroken, Rendezvous
from workers.processes.context import process_context
from workers.wiring.edges import ChannelSpec, open_receiver, open_sender

SOON_S = 0.05  # a wait that is meant to end in a timeout
DEADLINE_S = 20.0  # a wait that is meant to succeed
UNSEEN_S = 50.0
"""Before a failure that nobody saw would end as a stall, after 60 s."""
EDGE = ChannelSpec(
    Edge(0, 1, "activations", 0), "nccl", "", "a 0->1", 2, 4096, None, late_device.DEVICE, late_device.DEVICE
)


def sender_at(rendezvous: Rendezvous, edge: ChannelSpec = EDGE) -> NcclSender:
    late_device.register()
    end = open_sender(edge, lambda worker: None, rendezvous.join(DEADLINE_S), DEADLINE_S)
    assert isinstance(end, NcclSender)
    return end


def receiver_at(rendezvous: Rendezvous, edge: ChannelSpec = EDGE) -> NcclReceiver:
    late_device.register()
    end = open_receiver(edge, lambda worker: None, rendezvous.join(DEADLINE_S), DEADLINE_S)
    assert isinstance(end, NcclReceiver)
    return end


@pytest.fixture
def rendezvous(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rendezvous]:
    """Ends wait as long as it takes for each other's goodbye, and leave no thread behind."""
    monkeypatch.setattr(credit_end, "_CLOSE_WITHIN_S", DEADLINE_S)
    threads = set(threading.enumerate())
    with Rendezvous.hosted() as hosted:
        yield hosted
    assert set(threading.enumerate()) <= threads


@pytest.fixture
def ends(rendezvous: Rendezvous) -> Iterator[tuple[NcclSender, NcclReceiver]]:
    with both(rendezvous, EDGE, EDGE) as pair:
        yield pair


class both(ExitStack):  # noqa: N801 a context manager is called like a function
    """Two ends, that may see the edge differently; closed at once, as each waits for the other."""

    def __init__(self, rendezvous: Rendezvous, sends: ChannelSpec, receives: ChannelSpec) -> None:
        super().__init__()
        self._opened = rendezvous, sends, receives

    def __enter__(self) -> tuple[NcclSender, NcclReceiver]:  # type: ignore[override]
        rendezvous, sends, receives = self._opened
        pool = self.enter_context(ThreadPoolExecutor(2))
        other = pool.submit(receiver_at, rendezvous, receives)
        sender, receiver = sender_at(rendezvous, sends), other.result(DEADLINE_S)
        self.callback(lambda: list(pool.map(lambda end: end.close(), (sender, receiver))))
        return sender, receiver


def numbered(batch: int) -> Message:
    return Message(Kind.ACTIVATION, Item(batch), 0, (torch.full((300,), float(batch)), torch.tensor([batch])))


def assert_numbered(message: Message, batch: int) -> None:
    assert message.batch == batch
    assert [tensor.unique().tolist() for tensor in message.tensors] == [[batch], [batch]]


def eventually(what: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < end
        os.sched_yield()


def wire_of(end: NcclSender | NcclReceiver) -> LateLink:
    assert isinstance(end.wire, LateLink)
    return end.wire


def test_a_receive_is_queued_for_each_header_and_a_message_is_there_with_its_payload(
    ends: tuple[NcclSender, NcclReceiver],
) -> None:
    sender, receiver = ends
    with wires_down():
        tensors = numbered(0).tensors
        sender.send(Message(Kind.ACTIVATION, Item(0), 0, tensors), DEADLINE_S)
        tensors[0].fill_(-1.0)  # the snapshot is taken
        sender.send(numbered(1), DEADLINE_S)
        eventually(lambda: wire_of(receiver).under_way == 2)
        assert wire_of(sender).under_way == 2
        assert receiver.poll() is None
        assert not sender.room()
        with pytest.raises(ChannelTimeout, match=r"the sender waited 0\.05 s .*2/2 slots full"):
            sender.send(numbered(2), SOON_S)
        with pytest.raises(ChannelTimeout, match=r"the receiver waited 0\.05 s"):
            receiver.receive(SOON_S)
    for batch in (0, 1):
        assert_numbered(receiver.take_within(DEADLINE_S), batch)
    eventually(lambda: wire_of(receiver).under_way == wire_of(sender).under_way == 0)
    assert receiver.poll() is None


def test_nothing_is_sent_before_the_device_has_computed_it(ends: tuple[NcclSender, NcclReceiver]) -> None:
    sender, receiver = ends
    late_device.STANDSTILL.set()
    try:
        sender.send(numbered(3), DEADLINE_S)
        with pytest.raises(ChannelTimeout):
            receiver.receive(SOON_S)
        assert wire_of(sender).under_way == wire_of(receiver).under_way == 0
    finally:
        late_device.STANDSTILL.clear()
    assert_numbered(receiver.take_within(DEADLINE_S), 3)


def test_what_has_no_payload_stays_behind_what_has_one(ends: tuple[NcclSender, NcclReceiver]) -> None:
    sender, receiver = ends
    with wires_down():
        sender.send(numbered(4), DEADLINE_S)
        sender.send(Message(Kind.END, Item(5), 0, (torch.empty(0, 3),)), DEADLINE_S)
        eventually(lambda: wire_of(receiver).under_way == 1)
        with pytest.raises(ChannelTimeout):
            receiver.receive(SOON_S)
    assert_numbered(receiver.take_within(DEADLINE_S), 4)
    assert receiver.take_within(DEADLINE_S).kind is Kind.END


def test_a_slot_received_in_place_is_not_overwritten(ends: tuple[NcclSender, NcclReceiver]) -> None:
    sender, receiver = ends
    for batch in (0, 1):
        sender.send(numbered(batch), DEADLINE_S)
    first, second = receiver.receive(DEADLINE_S), receiver.receive(DEADLINE_S)
    receiver.release()
    sender.send(numbered(2), DEADLINE_S)
    assert_numbered(receiver.receive(DEADLINE_S), 2)
    assert_numbered(first, 0)
    assert_numbered(second, 1)


def test_a_sender_that_closes_waits_until_its_payloads_have_landed(ends: tuple[NcclSender, NcclReceiver]) -> None:
    """NCCL's send ends before everything has left: who cuts the wire then loses the last message."""
    sender, receiver = ends
    with ThreadPoolExecutor(1) as pool:
        with wires_down():
            for batch in (0, 1):
                sender.send(numbered(batch), DEADLINE_S)
            closing = pool.submit(sender.close)
            eventually(lambda: not receiver._thread.is_alive())  # it has heard the last word
            assert not receiver._peer_ended
            assert not wire_of(sender).is_cut
        closing.result(DEADLINE_S)
    assert wire_of(sender).is_cut
    for batch in (0, 1):
        assert_numbered(receiver.take_within(DEADLINE_S), batch)
    with pytest.raises(ChannelClosed, match="closed by the sender"):
        receiver.receive(DEADLINE_S)


def test_a_receiver_that_closes_early_leaves_no_sender_spinning(ends: tuple[NcclSender, NcclReceiver]) -> None:
    sender, receiver = ends
    with ThreadPoolExecutor(1) as pool:
        with wires_down():
            for batch in (0, 1):
                sender.send(numbered(batch), DEADLINE_S)
            closing = pool.submit(receiver.close)
            eventually(sender.room)  # it has heard
        closing.result(DEADLINE_S)
    eventually(lambda: wire_of(sender).under_way == 0)
    with pytest.raises(ChannelClosed, match="closed by the receiver"):
        sender.send(numbered(2), DEADLINE_S)
    assert wire_of(sender).under_way == 0


@pytest.mark.parametrize("where", ["in the device", "when it is asked"])
def test_a_wire_that_breaks_breaks_both_ends_and_what_has_landed_stays(
    ends: tuple[NcclSender, NcclReceiver], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = ends
    sender.send(numbered(0), DEADLINE_S)
    eventually(lambda: receiver.depth() == 1)
    if where == "in the device":
        wire_of(receiver).breaks = "ncclRemoteError"
    else:
        monkeypatch.setattr(wire_of(receiver), "receive", _refuse)
    sender.send(numbered(1), DEADLINE_S)
    eventually(lambda: receiver._broken is not None)
    assert_numbered(receiver.take_within(DEADLINE_S), 0)
    with pytest.raises(ChannelBroken, match=r"a 0->1: the connection broke .* last heard .*: ncclRemoteError"):
        receiver.receive(DEADLINE_S)
    eventually(lambda: sender._broken is not None)
    with pytest.raises(ChannelBroken, match="a 0->1: the connection broke"):
        sender.send(numbered(2), DEADLINE_S)
    eventually(lambda: wire_of(sender).is_cut and wire_of(receiver).is_cut)


def _refuse(payload: torch.Tensor) -> late_device.Transfer:
    raise PairBroken("ncclRemoteError")


def test_a_send_that_is_refused_takes_its_header_with_it(
    ends: tuple[NcclSender, NcclReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = ends
    monkeypatch.setattr(wire_of(sender), "send", _refuse)
    sender.send(numbered(0), DEADLINE_S)
    eventually(lambda: sender._broken is not None)
    with pytest.raises(ChannelBroken, match="ncclRemoteError"):
        sender.send(numbered(1), DEADLINE_S)
    with pytest.raises(ChannelBroken):
        receiver.receive(DEADLINE_S)
    assert wire_of(receiver).under_way == 0


def test_a_copy_that_fails_is_told_at_once(
    ends: tuple[NcclSender, NcclReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = ends
    monkeypatch.setattr(late_device.Mark, "synchronize", _illegal)
    sender.send(numbered(0), DEADLINE_S)
    with pytest.raises(ChannelBroken):
        receiver.receive(DEADLINE_S)
    with pytest.raises(ChannelBroken, match="an illegal memory access"):
        sender.send(numbered(1), DEADLINE_S)


def _illegal(mark: late_device.Mark) -> None:
    raise RuntimeError("an illegal memory access was encountered")


def test_ends_with_other_slots_find_out_before_a_receive_is_queued(rendezvous: Rendezvous) -> None:
    with both(rendezvous, EDGE, replace(EDGE, slot_bytes=1024)) as (sender, receiver):
        sender.send(numbered(0), DEADLINE_S)
        with pytest.raises(ChannelBroken, match=r"a message of 1,\d+ bytes came where slots have 1,024: both must run"):
            receiver.receive(DEADLINE_S)
        assert wire_of(receiver).under_way == 0


def test_a_header_too_long_is_refused_and_the_channel_goes_on(ends: tuple[NcclSender, NcclReceiver]) -> None:
    sender, receiver = ends
    with pytest.raises(ValueError, match="does not fit its slot"):
        sender.send(Message(Kind.ACTIVATION, Item(0), 0, (torch.ones(1, 1, 1, 1),) * 40), DEADLINE_S)
    sender.send(numbered(1), DEADLINE_S)
    assert_numbered(receiver.take_within(DEADLINE_S), 1)


def _one_message_then_half_of_one(rendezvous: Rendezvous, sends: bool) -> None:
    """Sends or receives batch 0; of batch 1 this side's wire carries nothing, until the process is killed."""
    torch.set_num_threads(1)
    if sends:
        sender = sender_at(rendezvous)
        sender.send(numbered(0), DEADLINE_S)
        eventually(lambda: sender.depth() == 0)
        late_device.WIRES_DOWN.set()
        sender.send(numbered(1), DEADLINE_S)
    else:
        receiver = receiver_at(rendezvous)
        receiver.receive(DEADLINE_S)
        late_device.WIRES_DOWN.set()
        receiver.release()
    threading.Event().wait(5 * DEADLINE_S)


@pytest.mark.processes
@pytest.mark.parametrize("sends", [True, False], ids=["sender", "receiver"])
def test_a_peer_that_dies_with_a_payload_under_way_frees_the_device_and_half_a_message_is_none(
    rendezvous: Rendezvous, sends: bool
) -> None:
    process = process_context().Process(target=_one_message_then_half_of_one, args=(rendezvous, sends), daemon=True)
    process.start()
    try:
        with receiver_at(rendezvous) if sends else sender_at(rendezvous) as end:
            if isinstance(end, NcclReceiver):
                assert_numbered(end.take_within(DEADLINE_S), 0)
            else:
                end.send(numbered(0), DEADLINE_S)
                eventually(lambda: end.depth() == 0)
                end.send(numbered(1), DEADLINE_S)
            eventually(lambda: wire_of(end).under_way == 1)
            process.kill()
            with pytest.raises(ChannelBroken, match="a 0->1: the connection broke while the"):
                end.receive(DEADLINE_S) if isinstance(end, NcclReceiver) else _flood(end)
            eventually(lambda: wire_of(end).under_way == 0 and wire_of(end).is_cut)
            end.staging.close()  # everything was called that waited for the device
            with pytest.raises(ChannelBroken):
                end.receive(0) if isinstance(end, NcclReceiver) else end.send(numbered(9), 0)
    finally:
        process.kill()
        process.join(DEADLINE_S)


def _flood(sender: NcclSender) -> None:
    for batch in range(2, 10):
        sender.send(numbered(batch), DEADLINE_S)


def over_wires(source: Callable[[], Recipe], plan: Plan, runs: Path) -> Result:
    """A run with wires everywhere; resolved by hand, as they would be refused on the CPU."""
    resolved = resolve_source(source, plan)
    channels = tuple(ChannelChoice("nccl", "as asked for") for _ in resolved.channels)
    resolved = replace(resolved, plan=replace(resolved.plan, channels="nccl"), channels=channels)
    return run(source, resolved, runs, "run", Console(quiet=True), ["test"])


@pytest.mark.processes
@pytest.mark.parametrize(
    "plan",
    [
        Plan(mode="naive", stages=3, sizes=(1, 5, 2), steps=12),
        Plan(mode="1f1b", microbatches=4, stages=3, sizes=(1, 5, 2), steps=8),
        Plan(stages=3, sizes=(1, 5, 2), steps=12, deterministic=True, targets="true"),
        Plan(mode="naive", stages=2, sizes=(4, 4), steps=8, replicas=2),
        Plan(mode="naive", stages=3, sizes=(1, 5, 2), steps=8, channel=ChannelPlan(wire_dtype="bf16")),
    ],
    ids=["naive", "1f1b", "unlocked", "replicas", "bf16"],
)
def test_runs_over_wires_give_the_numbers_of_the_reference(plan: Plan, tmp_path: Path) -> None:
    mine, truth = over_wires(wired.recipe, plan, tmp_path), run_reference(wired.recipe(), plan)
    assert_same(mine.state_tensors(), truth.state_tensors())
    assert mine.losses == truth.losses


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_the_stage_that_was_killed_is_named_not_the_one_whose_wire_broke(mode: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(RunFailed, match="was killed by SIGKILL, forward of batch 5") as caught:
        over_wires(wired.suicidal_recipe, Plan(mode=mode, stages=2, sizes=(2, 2), steps=100_000), tmp_path)
    assert caught.value.stage == 1
    assert time.monotonic() - begin < UNSEEN_S
