"""The channels of a run, one for each edge of its topology, and how a process opens its end of one, of any kind.

A new kind of channel adds a pair of functions to `_OPEN`, and to `_RING_SLOT_BYTES` if it has a ring in shared memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message, layout_of
from pipeline.model.cut import Cut
from pipeline.plan.channel_choice import kind_between, narrowed
from pipeline.plan.device_choice import CPU, on_gpu
from pipeline.plan.topology import Edge, edges_of, name_of
from pipeline.replicas.averaging import share_bytes
from pipeline.run.resolved import Resolved
from workers.channels.gpu.cuda_engine import CudaEngine
from workers.channels.gpu.cuda_ipc import HEADER_SLOT_BYTES, PeerEngine, PeerReceiver, PeerSender
from workers.channels.gpu.nccl_ends import LinkEngine, NcclReceiver, NcclSender
from workers.channels.interface import End, Receiver, Sender
from workers.channels.names import Names
from workers.channels.net.ends import RemoteReceiver, RemoteSender
from workers.channels.net.gloo import Meeting, Rendezvous
from workers.channels.shm.ring import ShmReceiver, ShmSender
from workers.channels.staging import NO_STAGING, DeviceStaging, Staging
from workers.channels.wakeup import WakeUp

__all__ = ["ENGINES", "ChannelSpec", "channels_of", "open_receiver", "open_sender", "rendezvous", "slot_bytes"]


@dataclass(frozen=True)
class ChannelSpec:
    """The bounded channel of one edge. Can be sent to any process.

    Attributes:
        edge: whose.
        kind: what carries it, a key of ``pipeline.plan.channel_choice.CHANNELS``.
        name: under which both ends find each other on one host.
        label: what errors call it.
        slots: how many messages fit.
        slot_bytes: bytes of the largest encoded message.
        wire_dtype: what float32 activations and gradients are narrowed to on their way.
        source_device: where the sender computes.
        target_device: where the receiver computes.
        generation: what its ends stamp messages with, and accept.
    """

    edge: Edge
    kind: str
    name: str
    label: str
    slots: int
    slot_bytes: int
    wire_dtype: torch.dtype | None = None
    source_device: str = CPU
    target_device: str = CPU
    generation: int = 0

    @property
    def meets(self) -> bool:
        """Whether its ends find each other at the run's rendezvous."""
        return self.kind not in _RING_SLOT_BYTES

    @property
    def meets_as(self) -> str:
        """Under which its ends find each other there."""
        return f"{self.label}, generation {self.generation}"

    @property
    def ring_slot_bytes(self) -> int | None:
        """Bytes of a slot of its ring in shared memory; None: it has none."""
        size = _RING_SLOT_BYTES.get(self.kind)
        return None if size is None else size(self)


def channels_of(resolved: Resolved, names: Names) -> Iterator[ChannelSpec]:
    """The channels of all edges of a run, in the one order in which every process opens its own."""
    for edge in edges_of(resolved.plan):
        yield _channel_of(edge, resolved, names)


def _channel_of(edge: Edge, resolved: Resolved, names: Names) -> ChannelSpec:
    """Between replicas one slot: a replica that has no room for a share goes on without."""
    plan, places = resolved.plan, [(resolved.hosts[w], resolved.devices[w]) for w in (edge.source, edge.target)]
    if edge.what == "averages":
        kind = kind_between(plan.channels, places[0], places[1], resolved.nccl)
        slots, size, wire_dtype = 1, share_bytes(resolved.state_bytes[edge.cut]), None
    else:
        replica, (down, up) = edge.source // plan.stages, slot_bytes(resolved.cuts[edge.cut], plan.wire_dtype)
        kind = resolved.channels[replica * len(resolved.cuts) + edge.cut].kind
        goes_down, wire_dtype = edge.what == "activations", plan.wire_dtype
        slots, size = (plan.activation_slots, down) if goes_down else (plan.gradient_slots_at(edge.cut), up)
    here, there = places[0][1], places[1][1]
    name, label = names.channel(edge), name_of(edge, plan)
    return ChannelSpec(edge, kind, name, label, slots, size, wire_dtype, here, there, names.generation)


def slot_bytes(cut: Cut, wire_dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Bytes of one slot of the activation channel and of the gradient channel of a cut."""
    h, context = (tuple(None if spec is None else spec.empty() for spec in specs) for specs in (cut.specs, cut.context))
    back = tuple(spec.empty() if spec is not None and spec.differentiable else None for spec in cut.specs)
    down, up = Message(Kind.ACTIVATION, Item(0), 0, h, context), Message(Kind.GRADIENT, Item(0), 0, back)
    return layout_of(narrowed(down, wire_dtype)).total_bytes, layout_of(narrowed(up, wire_dtype)).total_bytes


@contextlib.contextmanager
def rendezvous(resolved: Resolved, host: str = "127.0.0.1") -> Iterator[Rendezvous | None]:
    """Host, in this process, what the workers of a run need to find each other; None where shared memory does.

    Args:
        resolved: the run.
        host: this host's address, as all workers reach it.
    """
    if any(channel.meets for channel in channels_of(resolved, Names(""))):
        with Rendezvous.hosted(host) as hosted:
            yield hosted
    else:
        yield None


def open_sender(
    channel: ChannelSpec, bell: Callable[[int], WakeUp | None], meeting: Meeting | None, within_s: float
) -> Sender:
    """Open the sending end of a channel. Each process opens its ends in the order of ``channels_of``.

    Args:
        channel: the channel.
        bell: the bell of a worker, for those that the channel rings.
        meeting: where processes without common memory meet; None where every channel is in shared memory.
        within_s: how long to look for what is to be there, in seconds.

    Raises:
        ChannelTimeout: the other end, or the memory, was not there in time.

    Blocks:
        see ``ShmSender.attach``, ``RemoteSender.attach``, ``PeerSender.join`` and ``NcclSender.join``.
    """
    end = _OPEN[channel.kind][0](channel, bell, meeting, within_s)
    end.generation = channel.generation
    return end


def open_receiver(
    channel: ChannelSpec, bell: Callable[[int], WakeUp | None], meeting: Meeting | None, within_s: float
) -> Receiver:
    """Open the receiving end of a channel; as ``open_sender``."""
    end = _OPEN[channel.kind][1](channel, bell, meeting, within_s)
    end.generation = channel.generation
    return end


_Bells = Callable[[int], WakeUp | None]
_End = TypeVar("_End", bound=End)


class _Engine(PeerEngine, LinkEngine, Protocol):
    """For every kind of channel."""


ENGINES: dict[str, Callable[[str], _Engine]] = {"cuda": CudaEngine}
"""What copies for the devices of a kind."""


def _engine(device: str) -> _Engine:
    return ENGINES[device.partition(":")[0]](device)


def _on_lane(device: str, label: str, attach: Callable[[Staging], _End]) -> _End:
    """Attach an end whose worker computes on a device; nothing stays behind where it fails."""
    lane = DeviceStaging(_engine(device), label) if on_gpu(device) else NO_STAGING
    try:
        return attach(lane)
    except BaseException:
        lane.close()
        raise


def _shm_sender(channel: ChannelSpec, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    attach = partial(
        ShmSender.attach,
        channel.name,
        label=channel.label,
        deadline_s=within_s,
        receiver_bell=bell(channel.edge.target),
        wire_dtype=channel.wire_dtype,
    )
    return _on_lane(channel.source_device, channel.label, lambda lane: attach(lane=lane))


def _shm_receiver(channel: ChannelSpec, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    attach = partial(
        ShmReceiver.attach,
        channel.name,
        label=channel.label,
        deadline_s=within_s,
        sender_bell=bell(channel.edge.source),
    )
    return _on_lane(channel.target_device, channel.label, lambda lane: attach(lane=lane))


def _gloo_sender(channel: ChannelSpec, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    return _remote(RemoteSender, channel, channel.edge.source, channel.source_device, bell, meeting, within_s)


def _gloo_receiver(channel: ChannelSpec, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    return _remote(RemoteReceiver, channel, channel.edge.target, channel.target_device, bell, meeting, within_s)


_Remote = TypeVar("_Remote", RemoteSender, RemoteReceiver)


def _remote(
    end: type[_Remote],
    channel: ChannelSpec,
    worker: int,
    device: str,
    bell: _Bells,
    meeting: Meeting | None,
    within_s: float,
) -> _Remote:
    assert meeting is not None, "an edge over gloo needs a rendezvous"
    attach = partial(
        end.attach,
        meeting,
        channel.meets_as,
        label=channel.label,
        slots=channel.slots,
        slot_bytes=channel.slot_bytes,
        deadline_s=within_s,
        bell=bell(worker),
        wire_dtype=channel.wire_dtype,
    )
    return _on_lane(device, channel.label, lambda lane: attach(lane=lane))


def _peer_sender(channel: ChannelSpec, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    return PeerSender.join(
        channel.name,
        label=channel.label,
        slot_bytes=channel.slot_bytes,
        deadline_s=within_s,
        engine=_engine(channel.source_device),
        receiver_bell=bell(channel.edge.target),
        wire_dtype=channel.wire_dtype,
    )


def _peer_receiver(channel: ChannelSpec, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    return PeerReceiver.join(
        channel.name,
        label=channel.label,
        slot_bytes=channel.slot_bytes,
        deadline_s=within_s,
        engine=_engine(channel.target_device),
        sender_bell=bell(channel.edge.source),
    )


def _wire_sender(channel: ChannelSpec, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    return _wired(NcclSender, channel, channel.edge.source, channel.source_device, bell, meeting, within_s)


def _wire_receiver(channel: ChannelSpec, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    return _wired(NcclReceiver, channel, channel.edge.target, channel.target_device, bell, meeting, within_s)


_Wired = TypeVar("_Wired", NcclSender, NcclReceiver)


def _wired(
    end: type[_Wired],
    channel: ChannelSpec,
    worker: int,
    device: str,
    bell: _Bells,
    meeting: Meeting | None,
    within_s: float,
) -> _Wired:
    assert meeting is not None, "the headers go over gloo, and an edge over gloo needs a rendezvous"
    return end.join(
        meeting,
        channel.meets_as,
        label=channel.label,
        slots=channel.slots,
        slot_bytes=channel.slot_bytes,
        deadline_s=within_s,
        engine=_engine(device),
        bell=bell(worker),
        wire_dtype=channel.wire_dtype,
    )


_OPEN = {
    "shm": (_shm_sender, _shm_receiver),
    "gloo": (_gloo_sender, _gloo_receiver),
    "cuda": (_peer_sender, _peer_receiver),
    "nccl": (_wire_sender, _wire_receiver),
}
_RING_SLOT_BYTES: dict[str, Callable[[ChannelSpec], int]] = {
    "shm": lambda channel: channel.slot_bytes,
    "cuda": lambda channel: HEADER_SLOT_BYTES,
}
"""Kinds with a ring in shared memory."""
