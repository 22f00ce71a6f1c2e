"""The directed edges of a run, and how a process opens its end of one, whatever carries it.

cut k:   stage k  --activations k->k+1-->  stage k+1        two edges, of one kind
         stage k  <--gradients k+1->k---   stage k+1

every stage of several replicas:   replica r  --averages r->q-->  replica q        for every two, both ways

A new kind of channel adds a pair of functions to `_OPEN`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from pipeline.averaging import share_bytes
from pipeline.channels import kind_between, narrowed
from pipeline.cut import Cut
from pipeline.messages import Kind, Message, layout_of
from pipeline.replicas import worker_of
from pipeline.resolve import Resolved
from workers.assignment import Names
from workers.bell import Bell
from workers.channel import Receiver, Sender
from workers.gloo import Meeting, Rendezvous
from workers.remote import RemoteReceiver, RemoteSender
from workers.shm import ShmReceiver, ShmSender

__all__ = ["Edge", "edges_of", "open_receiver", "open_sender", "rendezvous", "slot_bytes"]


@dataclass(frozen=True)
class Edge:
    """One bounded channel from one stage to another. Can be sent to any process.

    Attributes:
        kind: what carries it, a key of ``pipeline.channels.CHANNELS``.
        what: travels on it: "activations", "gradients", or "averages" between the replicas of a stage.
        name: under which both ends find each other on one host.
        label: what errors call it, and under which both ends find each other at the run's own rendezvous.
        source: number of the worker that sends.
        target: number of the worker that receives.
        slots: how many messages fit.
        slot_bytes: bytes of the largest encoded message.
        wire_dtype: what float32 activations and gradients are narrowed to on their way.
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
        label = f"activations {k}->{k + 1}{of}"
        yield Edge(choice.kind, "activations", names.activations(w), label, w, w + 1, slots, size, wire)
        slots, label = plan.gradient_slots_at(k), f"gradients {k + 1}->{k}{of}"
        yield Edge(choice.kind, "gradients", names.gradients(w), label, w + 1, w, slots, up, wire)


def _edges_between_replicas(resolved: Resolved, names: Names) -> Iterator[Edge]:
    """One slot each: a replica that has no room for a share goes on without."""
    plan = resolved.plan
    for k, state_bytes in enumerate(resolved.state_bytes):
        for one, other in itertools.permutations(range(plan.replicas), 2):
            source, target = worker_of(plan, one, k), worker_of(plan, other, k)
            label = f"averages {one}->{other} of stage {k}"
            name = names.averages(source, target)
            kind = kind_between(plan.channels, resolved.hosts[source], resolved.hosts[target])
            yield Edge(kind, "averages", name, label, source, target, 1, share_bytes(state_bytes))


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
    if any(edge.kind == "gloo" for edge in edges_of(resolved, Names(""))):
        with Rendezvous.hosted(host) as hosted:
            yield hosted
    else:
        yield None


def open_sender(edge: Edge, bell: Callable[[int], Bell | None], meeting: Meeting | None, within_s: float) -> Sender:
    """Open the sending end of an edge. Each process opens its ends in the order of ``edges_of``.

    Args:
        edge: the edge.
        bell: the bell of a worker, for those that the channel rings.
        meeting: where processes without common memory meet; None where every edge is in shared memory.
        within_s: how long to look for what is to be there, in seconds.

    Raises:
        ChannelTimeout: the other end, or the memory, was not there in time.

    Blocks:
        see ``ShmSender.attach`` and ``RemoteSender.attach``.
    """
    return _OPEN[edge.kind][0](edge, bell, meeting, within_s)


def open_receiver(edge: Edge, bell: Callable[[int], Bell | None], meeting: Meeting | None, within_s: float) -> Receiver:
    """Open the receiving end of an edge; as ``open_sender``."""
    return _OPEN[edge.kind][1](edge, bell, meeting, within_s)


_Bells = Callable[[int], Bell | None]


def _shm_sender(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    return ShmSender.attach(
        edge.name,
        label=edge.label,
        deadline_s=within_s,
        receiver_bell=bell(edge.target),
        wire_dtype=edge.wire_dtype,
    )


def _shm_receiver(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    return ShmReceiver.attach(edge.name, label=edge.label, deadline_s=within_s, sender_bell=bell(edge.source))


def _gloo_sender(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Sender:
    return _remote(RemoteSender, edge, bell(edge.source), meeting, within_s)


def _gloo_receiver(edge: Edge, bell: _Bells, meeting: Meeting | None, within_s: float) -> Receiver:
    return _remote(RemoteReceiver, edge, bell(edge.target), meeting, within_s)


_Remote = TypeVar("_Remote", RemoteSender, RemoteReceiver)


def _remote(end: type[_Remote], edge: Edge, bell: Bell | None, meeting: Meeting | None, within_s: float) -> _Remote:
    assert meeting is not None, "an edge over gloo needs a rendezvous"
    return end.attach(
        meeting,
        edge.label,
        label=edge.label,
        slots=edge.slots,
        slot_bytes=edge.slot_bytes,
        deadline_s=within_s,
        bell=bell,
        wire_dtype=edge.wire_dtype,
    )


_OPEN = {"shm": (_shm_sender, _shm_receiver), "gloo": (_gloo_sender, _gloo_receiver)}
