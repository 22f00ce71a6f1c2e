"""The channels of a run, one for each edge of its topology, and how a process opens its end of one, of any kind.

A new kind of channel adds its `ChannelKind` to `KINDS`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message, layout_of
from pipeline.model.cut import Cut
from pipeline.plan.channel_choice import kind_between, narrowed
from pipeline.plan.topology import Edge, edges_of, name_of
from pipeline.replicas.averaging import share_bytes
from pipeline.run.resolved import Resolved
from workers.channels.engine import Engine
from workers.channels.gpu.cuda_engine import CudaEngine
from workers.channels.gpu.cuda_ipc import CUDA_IPC
from workers.channels.gpu.nccl_ends import NCCL
from workers.channels.interface import End, Receiver, Sender
from workers.channels.names import Meeting, Names
from workers.channels.net.ends import GLOO
from workers.channels.net.gloo import Rendezvous
from workers.channels.shm.ring import SHM
from workers.channels.spec import ChannelSpec, Opening
from workers.channels.staging import DeviceStaging
from workers.channels.wakeup import WakeUp

__all__ = [
    "ENGINES",
    "KINDS",
    "ChannelSpec",
    "channels_of",
    "open_receiver",
    "open_sender",
    "rendezvous",
    "ring_slot_bytes",
]

KINDS = {kind.name: kind for kind in (SHM, GLOO, CUDA_IPC, NCCL)}
"""What can carry a channel, by the keys of ``pipeline.plan.channel_choice.CHANNELS``."""
ENGINES: dict[str, Callable[[str], Engine | None]] = {"cpu": lambda device: None, "cuda": CudaEngine}
"""Makes what copies for a device, by its kind; None: it needs nothing."""


def ring_slot_bytes(channel: ChannelSpec) -> int | None:
    """Bytes of a slot of a channel's ring in shared memory; None: it has none, and its ends meet at the rendezvous."""
    size = KINDS[channel.kind].ring_slot_bytes
    return None if size is None else size(channel)


def channels_of(resolved: Resolved, names: Names) -> Iterator[ChannelSpec]:
    """The channels of all edges of a run, in the one order in which every process opens its own."""
    return (_channel_of(edge, resolved, names) for edge in edges_of(resolved.plan))


def _channel_of(edge: Edge, resolved: Resolved, names: Names) -> ChannelSpec:
    """Between replicas one slot: a replica that has no room for a share goes on without."""
    plan, places = resolved.plan, [(resolved.hosts[w], resolved.devices[w]) for w in (edge.source, edge.target)]
    if edge.what == "averages":
        kind = kind_between(plan.channels, places[0], places[1], resolved.nccl)
        slots, size, wire_dtype = (
            1,
            share_bytes(plan.ties.nbytes + 1 if plan.ties else resolved.state_bytes[edge.cut]),
            None,
        )
    else:
        replica, (down, up) = edge.source // plan.stages, _slot_bytes(resolved.cuts[edge.cut], plan.wire_dtype)
        kind = resolved.channels[replica * len(resolved.cuts) + edge.cut].kind
        goes_down, wire_dtype = edge.what == "activations", plan.wire_dtype
        slots, size = (plan.activation_slots, down) if goes_down else (plan.gradient_slots_at(edge.cut), up)
    here, there = places[0][1], places[1][1]
    name, label = names.channel(edge), name_of(edge, plan)
    return ChannelSpec(edge, kind, name, label, slots, size, wire_dtype, here, there, names.generation)


def _slot_bytes(cut: Cut, wire_dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes of one slot of the activation channel and of the gradient channel of a cut."""
    h, context = (tuple(None if spec is None else spec.empty() for spec in specs) for specs in (cut.specs, cut.context))
    back = tuple(spec.empty() if spec is not None and spec.differentiable else None for spec in cut.specs)
    down, up = Message(Kind.ACTIVATION, Item(0), 0, h, context), Message(Kind.GRADIENT, Item(0), 0, back)
    return layout_of(narrowed(down, wire_dtype)).total_bytes, layout_of(narrowed(up, wire_dtype)).total_bytes


@contextlib.contextmanager
def rendezvous(resolved: Resolved, host: str = "127.0.0.1") -> Iterator[Rendezvous | None]:
    """Host, at this host's address, what workers without common memory need to find each other; None: all share it."""
    if any(ring_slot_bytes(channel) is None for channel in channels_of(resolved, Names(""))):
        with Rendezvous.hosted(host) as hosted:
            yield hosted
    else:
        yield None


def open_sender(
    channel: ChannelSpec, bell: Callable[[int], WakeUp | None], meeting: Meeting | None, within_s: float
) -> Sender:
    """Open the sending end of a channel (see ``Opening``). Each process does so in the order of ``channels_of``.

    Raises ChannelTimeout where the other end, or the memory, was not there in time; blocks as the kind of end says.
    """
    return _opened(KINDS[channel.kind].sender, channel, channel.source_device, Opening(within_s, bell, meeting))


def open_receiver(
    channel: ChannelSpec, bell: Callable[[int], WakeUp | None], meeting: Meeting | None, within_s: float
) -> Receiver:
    """Open the receiving end of a channel; as ``open_sender``."""
    return _opened(KINDS[channel.kind].receiver, channel, channel.target_device, Opening(within_s, bell, meeting))


_E = TypeVar("_E", bound=End)


def _opened(kind: Callable[[ChannelSpec, Opening], _E], channel: ChannelSpec, device: str, opening: Opening) -> _E:
    """An end whose worker computes on a device; nothing stays behind where it fails."""
    engine = ENGINES[device.partition(":")[0]](device)
    if engine is None:
        return kind(channel, opening)
    staging = DeviceStaging(engine, channel.label)
    try:
        return kind(channel, replace(opening, staging=staging))
    except BaseException:
        staging.close()
        raise
