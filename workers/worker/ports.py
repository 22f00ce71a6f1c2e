"""A worker's queues as its Runner sees them, by edge: the data, the channels around the stage, and what they ring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from pipeline.data.loader import inputs
from pipeline.data.recipe import Recipe, open_data
from pipeline.messages.message import Kind, Message
from pipeline.metrics.spans import Recorder, Span
from pipeline.plan.device_choice import on_gpu
from pipeline.plan.topology import Edge, What, data_edge
from workers.channels.interface import Receiver, Sender
from workers.channels.wakeup import SPIN_S, WakeUp
from workers.clock import now_ns
from workers.wiring.edges import channels_of, open_receiver, open_sender, ring_slot_bytes
from workers.worker.assignment import Assignment
from workers.worker.emulated import DelayedReceiver

__all__ = ["Ports", "attached"]

_TRAINING = (Kind.ACTIVATION, Kind.AWAITED, Kind.GRADIENT)


@dataclass
class Loading:
    """The data as an inlet."""

    messages: Iterator[Message]
    record: Recorder

    def take(self) -> Message | None:
        """The next message; makes the batch."""
        self.record(Span.LOAD, -1)
        message = next(self.messages, None)
        self.record(Span.OTHER, -1)
        return message

    def depth(self) -> int:
        """There is no queue in front of the data."""
        return -1


@dataclass
class Taking:
    """A receiver as an inlet."""

    receiver: Receiver
    record: Recorder
    delayed: DelayedReceiver | None = None

    def take(self) -> Message | None:
        """The next message as a copy, its slot free again, or None."""
        if (message := (self.delayed or self.receiver).poll()) is None:
            return None
        self.record(Span.RECEIVE, message.batch)
        owned = self.receiver.copied(message)
        self.record(Span.OTHER, -1)
        return owned

    def depth(self) -> int:
        """Slots in use."""
        return self.receiver.depth()


@dataclass
class Putting:
    """A sender as an outlet."""

    sender: Sender
    deadline_s: float
    stamps: bool
    sent_bytes: int = 0  # of the tensors of training batches

    def room(self) -> bool:
        """Whether ``put`` would not block."""
        return self.sender.room()

    def put(self, message: Message) -> None:
        """Send; notes the time where a link is emulated."""
        if message.kind in _TRAINING:
            self.sent_bytes += sum(tensor.nbytes for tensor in message.tensors)
        self.sender.send(replace(message, sent_ns=now_ns()) if self.stamps else message, self.deadline_s)


@dataclass
class Ports:
    """Everything around a stage, by edge: where messages come in, where they go out, and what they ring."""

    bell: WakeUp
    inlets: dict[Edge, Loading | Taking]
    outlets: dict[Edge, Putting]

    def depth(self) -> int:
        """Messages that wait on the way into the stage; -1 in front of the data."""
        (waiting,) = (port.depth() for edge, port in self.inlets.items() if edge.what == "activations")
        return waiting

    def sent_bytes(self, what: What) -> int:
        """Bytes of the tensors sent so far for training on edges of a kind."""
        return sum(port.sent_bytes for edge, port in self.outlets.items() if edge.what == what)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until somebody rings or a message is due; False when neither came within ``timeout_s`` seconds."""
        delayed = [port.delayed for port in self.inlets.values() if isinstance(port, Taking) and port.delayed]
        dues = [end.due_ns for end in delayed if end.due_ns is not None]
        if not dues:
            return self.bell.wait(timeout_s)
        due_s = (min(dues) - now_ns()) * 1e-9
        return self.bell.wait(max(0.0, min(due_s, timeout_s))) or due_s <= timeout_s


@contextlib.contextmanager
def attached(
    assignment: Assignment, recipe: Recipe, record: Recorder, enough: Callable[[int], bool]
) -> Iterator[Ports]:
    """Attach a worker's ends of all its channels; closes them on the way out.

    ``enough`` is asked by stage 0 before every training batch, with its number: True ends the run. Raises TimeoutError
    where something was not there in time.
    """
    k, within_s, plan = assignment.worker, assignment.attach_within_s, assignment.plan
    mine = [c for c in channels_of(assignment.resolved, assignment.names) if k in (c.edge.source, c.edge.target)]
    rendezvous = assignment.rendezvous if any(ring_slot_bytes(channel) is None for channel in mine) else None
    with contextlib.ExitStack() as stack:

        def bell(worker: int) -> WakeUp:
            spin_s = 0.0 if rendezvous or on_gpu(assignment.device) else SPIN_S  # where threads of this process ring
            return stack.enter_context(WakeUp.attach(assignment.names.bell(worker), within_s, spin_s))

        ports, meeting = Ports(bell(k), {}, {}), None if rendezvous is None else rendezvous.join(within_s)
        if assignment.index == 0:
            open_data(recipe, plan)
            messages = inputs(recipe, plan, assignment.resolved.steps, enough, assignment.replica)
            ports.inlets[data_edge(plan, assignment.replica)] = Loading(messages, record)
        for channel in mine:
            if channel.edge.source == k:
                sender = stack.enter_context(open_sender(channel, bell, meeting, within_s))
                ports.outlets[channel.edge] = Putting(sender, plan.stall_after_s, stamps=plan.links is not None)
            else:
                receiver = stack.enter_context(open_receiver(channel, bell, meeting, within_s))
                if receiver.staging is not None:
                    receiver.staging.before_landing = partial(record, Span.RECEIVE)
                delayed = DelayedReceiver(receiver, plan.links) if plan.links is not None else None
                ports.inlets[channel.edge] = Taking(receiver, record, delayed)
        yield ports
