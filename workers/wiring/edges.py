"""The directed edges of a run, and how a process opens its end of one, whatever carries it.

cut k:   stage k  --activations k->k+1-->  stage k+1        two edges, of one kind
         stage k  <--gradients k+1->k---   stage k+1

every stage of several replicas:   replica r  --averages r->q-->  replica q        for every two, both ways

A new kind of channel adds a pair of functions to `_OPEN`, and to `_RING_SLOT_BYTES` if it has a ring in shared memory.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from pipeline.messages.message import Kind, Message, layout_of
from pipeline.model.cut import Cut
from pipeline.plan.channel_choice import kind_between, narrowed
from pipeline.plan.device_choice import CPU, on_gpu
from pipeline.plan.replica_layout import worker_of
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

__all__ = ["ENGINES", "Edge", "edges_of", "open_receiver", "open_sender", "rendezvous", "slot_bytes"]


@dataclass(frozen=True)
class Edge:
    """One bounded channel from one stage to another. Can be sent to any process.

    Attributes:
        kind: what carries it, a key of ``pipeline.plan.channel_choice.CHANNELS``.
        what: travels on it: "activations", "gradients", or "averages" between the replicas of a stage.
        name: under which both ends find each other on one host.
        label: what errors call it, and under which both ends find each other at the run's own rendezvous.
        source: number of the worker that sends.
        target: number of the worker that receives.
        slots: how many messages fit.
        slot_bytes: bytes of the largest encoded message.
        wire_dtype: what float32 activations and gradients are narrowed to on their way.
        source_device: where the sender computes.
        target_device: where the receiver computes.
    """

    kind: str
    what: str
    name: str
    label: str
    source: int
    target: int
    slots: int
    slot_bytes: int
    wire_dtype: torch.dtype | None = None
    source_device: str = CPU
    target_device: str = CPU

    @property
    def meets(self) -> bool:
        """Whether its ends find each other at the run's rendezvous."""
        return self.kind not in _RING_SLOT_BYTES

    @property
    def ring_slot_bytes(self) -> int | None:
        """Bytes of a slot of its ring in shared memory; None: it has none."""
        size = _RING_SLOT_BYTES.get(self.kind)
        return None if size is None else size(self)


def edges_of(resolved: Resolved, names: Names) -> Iterator[Edge]:
    """All edges of a run, in the one order in which every process opens its own."""
    for replica in range(resolved.plan.replicas):
        yield from _edges_of_replica(resolved, names, replica)
    yield from _edges_between_replicas(resolved, names)


def _edges_of_replica(resolved: Resolved, names: Names, replica: int) -> Iterator[Edge]:
    plan, of = resolved.plan, f" of replica {replica}" if resolved.plan.replicas > 1 else ""
    num_cuts = len(resolved.cuts)
    choices = resolved.channels[replica * num_cuts : (replica + 1) * num_cuts]
    for k, (cut, choice) in enumerate(zip(resolved.cuts, choices, strict=True)):
        size, up = slot_bytes(cut, plan.wire_dtype)
        w, slots, wire = worker_of(plan, replica, k), plan.activation_slots, plan.wire_dtype
        label, (one, other) = f"activations {k}->{k + 1}{of}", resolved.devices[w : w + 2]
        yield Edge(choice.kind, "activations", names.activations(w), label, w, w + 1, slots, size, wire, one, other)
        slots, label = plan.gradient_slots_at(k), f"gradients {k + 1}->{k}{of}"
        yield Edge(choice.kind, "gradients", names.gradients(w), label, w + 1, w, slots, up, wire, other, one)


def _edges_between_replicas(resolved: Resolved, names: Names) -> Iterator[Edge]:
    """One slot each: a replica that has no room for a share goes on without."""
    plan = resolved.plan
    for k, state_bytes in enumerate(resolved.state_bytes):
        for one, other in itertools.permutations(range(plan.replicas), 2):
            source, target = worker_of(plan, one, k), worker_of(plan, other, k)
            label = f"averages {one}->{other} of stage {k}"
            name = names.averages(source, target)
            places = [(resolved.hosts[worker], resolved.devices[worker]) for worker in (source, target)]
            kind = kind_between(plan.channels, places[0], places[1], resolved.nccl)
            size = share_bytes(state_bytes)
            yield Edge(kind, "averages", name, label, source, target, 1, size, None, places[0][1], places[1][1])


def slot_bytes(cut: Cut, wire_dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Bytes of one slot of the activation channel and of the gradient channel of a cut."""
    h = torch.empty(cut.activation_shape, dtype=cut.activation_dtype, device="meta")
    labels = torch.empty(cut.label_shape, dtype=cut.label_dtype, device="meta")
    down = layout_of(narrowed(Message(Kind.ACTIVATION, 0, 0, (h, labels)), wire_dtype)).total_bytes
    up = layout_of(narrowed(Message(Kind.GRADIENT, 0, 0, (h,)), wire_dtype)).total_bytes
    return down, up


@contextlib.contextmanager
def rendezvous(resolved: Resolved, host: str = "127.0.0.1") -> Iterator[Rendezvous | None]:
    """Host, in this process, what the workers of a run need to find each other; None where shared memory does.

    Args:
        resolved: the run.
        host: this host's address, as all workers reach it.
    """
    if any(edge.meets for edge in edges_of(resolved, Names(""))):
        with Rendezvous.hosted(host) as hosted:
            yield hosted
    else:
        yield None


def open_sender(edge: Edge, bell: Callable[[int], WakeUp | None], meeting: Meeting | None, within_s: float) -> Sender:
    """Open the sending end of an edge. Each process opens its ends in the order of ``edges_of``.

    Args:
        edge: the edge.
        bell: the bell of a worker, for those that the channel rings.
        meeting: where processes without common memory meet; None where every edge is in shared memory.
        within_s: how long to look for what is to be there, in seconds.

    Raises:
        ChannelTimeout: the other end, or the memory, was not there in time.

    Blocks:
        see ``ShmSender.attach``, ``RemoteSender.attach``, ``PeerSender.join`` and ``NcclSender.join``.
    """
    return _OPEN[edge.kind][0](edge, bell, meeting, within_s)


def open_receiver(
    edge: Edge, bell: Callable[[int], WakeUp | None], meeting: Meeting | None, within_s: float
) -> Receiver:
    """Open the receiving end of an edge; as ``open_sender``."""
    return _OPEN[edge.kind][1](edge, bell, meeting, within_s)


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


def _shm_sender(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    attach = partial(
        ShmSender.attach,
        edge.name,
        label=edge.label,
        deadline_s=within_s,
        receiver_bell=bell(edge.target),
        wire_dtype=edge.wire_dtype,
    )
    return _on_lane(edge.source_device, edge.label, lambda lane: attach(lane=lane))


def _shm_receiver(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    attach = partial(
        ShmReceiver.attach, edge.name, label=edge.label, deadline_s=within_s, sender_bell=bell(edge.source)
    )
    return _on_lane(edge.target_device, edge.label, lambda lane: attach(lane=lane))


def _gloo_sender(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    return _remote(RemoteSender, edge, edge.source, edge.source_device, bell, meeting, within_s)


def _gloo_receiver(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    return _remote(RemoteReceiver, edge, edge.target, edge.target_device, bell, meeting, within_s)


_Remote = TypeVar("_Remote", RemoteSender, RemoteReceiver)


def _remote(
    end: type[_Remote], edge: Edge, worker: int, device: str, bell: _Bells, meeting: Meeting | None, within_s: float
) -> _Remote:
    assert meeting is not None, "an edge over gloo needs a rendezvous"
    attach = partial(
        end.attach,
        meeting,
        edge.label,
        label=edge.label,
        slots=edge.slots,
        slot_bytes=edge.slot_bytes,
        deadline_s=within_s,
        bell=bell(worker),
        wire_dtype=edge.wire_dtype,
    )
    return _on_lane(device, edge.label, lambda lane: attach(lane=lane))


def _peer_sender(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    return PeerSender.join(
        edge.name,
        label=edge.label,
        slot_bytes=edge.slot_bytes,
        deadline_s=within_s,
        engine=_engine(edge.source_device),
        receiver_bell=bell(edge.target),
        wire_dtype=edge.wire_dtype,
    )


def _peer_receiver(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    return PeerReceiver.join(
        edge.name,
        label=edge.label,
        slot_bytes=edge.slot_bytes,
        deadline_s=within_s,
        engine=_engine(edge.target_device),
        sender_bell=bell(edge.source),
    )


def _wire_sender(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    return _wired(NcclSender, edge, edge.source, edge.source_device, bell, meeting, within_s)


def _wire_receiver(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    return _wired(NcclReceiver, edge, edge.target, edge.target_device, bell, meeting, within_s)


_Wired = TypeVar("_Wired", NcclSender, NcclReceiver)


def _wired(
    end: type[_Wired], edge: Edge, worker: int, device: str, bell: _Bells, meeting: Meeting | None, within_s: float
) -> _Wired:
    assert meeting is not None, "the headers go over gloo, and an edge over gloo needs a rendezvous"
    return end.join(
        meeting,
        edge.label,
        label=edge.label,
        slots=edge.slots,
        slot_bytes=edge.slot_bytes,
        deadline_s=within_s,
        engine=_engine(device),
        bell=bell(worker),
        wire_dtype=edge.wire_dtype,
    )


_OPEN = {
    "shm": (_shm_sender, _shm_receiver),
    "gloo": (_gloo_sender, _gloo_receiver),
    "cuda": (_peer_sender, _peer_receiver),
    "nccl": (_wire_sender, _wire_receiver),
}
_RING_SLOT_BYTES: dict[str, Callable[[Edge], int]] = {
    "shm": lambda edge: edge.slot_bytes,
    "cuda": lambda edge: HEADER_SLOT_BYTES,
}
"""Kinds with a ring in shared memory."""
