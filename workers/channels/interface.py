"""The two ends of a channel: what every implementation promises to the worker loop.

A channel is one directed edge of the pipeline, bounded, with one sender and one receiver.

    Sender.send --> | slot | slot | slot | slot | --> Receiver.poll ... Receiver.release
                      freed by release               the message is read in place until then

A full channel is the back-pressure: `send` waits. Every wait has a deadline, and its error tells who
waited for whom, for how long, and how full the channel was. An end belongs to one thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NoReturn, Self

from pipeline.messages.message import Message
from workers.channels.errors import ChannelBroken, ChannelClosed, ChannelTimeout
from workers.channels.slot import Slot
from workers.channels.spec import ChannelSpec, Opening
from workers.channels.staging import LandingSlot, StagedSlot

__all__ = ["ChannelKind", "End", "Receiver", "Sender"]


class End(ABC):
    """What both ends share. Whoever opens several ends does so in an order common to all processes.

    ``rings`` is the worker whose bell this end rings; the attributes are those of ``ChannelSpec`` and ``Opening``.

    Raises:
        ChannelTimeout: the other end, or the memory, was not there in time.
    """

    side: ClassVar[int]  # 0 sends, 1 receives
    who: ClassVar[str]
    peer: ClassVar[str]
    _awaits: ClassVar[str]
    _header_bytes: ClassVar[int] = 0
    """Bytes of a slot that holds a header only; 0: the tensors lie in the slots, where a device copies them."""

    def __init__(self, channel: ChannelSpec, opening: Opening, rings: int) -> None:
        self.label, self.capacity, self.generation = channel.label, channel.slots, channel.generation
        self.staging, self._bell = opening.staging, opening.bell(rings)

    @abstractmethod
    def depth(self) -> int:
        """Number of slots in use, from the start of a send to the release. Never blocks; 0 once closed."""

    @abstractmethod
    def close(self) -> None:
        """Close this end; a second call does nothing. The peer gets `ChannelClosed`, at once or when drained.

        Messages already received stay readable for as long as somebody holds them.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @abstractmethod
    def _slot(self, memory: memoryview, channel: ChannelSpec) -> Slot:
        """A slot as this end sees it."""

    def _pin(self, memory: memoryview) -> None:
        if self.staging is not None and not self._header_bytes:
            self.staging.pin(memory)

    def _once_copied(self, call: Callable[[], None]) -> None:
        """Call when what goes to or comes from a device is copied, in the staging's thread; on the CPU at once."""
        if self.staging is None:
            call()
        else:
            self.staging.then(call)

    def _drain(self) -> None:
        """Wait until what is under way to or from a device is copied."""
        if self.staging is not None:
            self.staging.close()

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    def _fullness(self) -> str:
        return f"{self.depth()}/{self.capacity} slots full"

    def _refuse(self, closed_by: str) -> NoReturn:
        raise ChannelClosed(f"{self.label}: closed by {closed_by} ({self._fullness()})")

    def _give_up(self, waited_s: float) -> NoReturn:
        raise ChannelTimeout(
            f"{self.label}: the {self.who} waited {waited_s:.3g} s for {self._awaits} ({self._fullness()})"
        )


class Sender(End):
    """The end that sends."""

    side, who, peer, _awaits = 0, "sender", "receiver", "the receiver to free a slot"

    @abstractmethod
    def room(self) -> bool:
        """Whether a send would not block now. True once the receiver closed: a send then raises at once."""

    @abstractmethod
    def send(self, message: Message, deadline_s: float) -> None:
        """Copy and send one message; on return its tensors may be changed (those of a device by its current stream).

        Raises:
            ChannelTimeout: the channel stayed full.
            ChannelClosed: one of the ends is closed.
            ValueError: the message is larger than a slot.

        Blocks:
            while the channel is full, at most ``deadline_s`` seconds from now.
        """

    def _stamped(self, message: Message) -> Message:
        """The message with the generation of this end."""
        return message if message.generation == self.generation else replace(message, generation=self.generation)

    def _slot(self, memory: memoryview, channel: ChannelSpec) -> Slot:
        wire_dtype = channel.wire_dtype
        return Slot(memory, wire_dtype) if self.staging is None else StagedSlot(memory, wire_dtype, self.staging)


class Receiver(End):
    """The end that receives. `poll` and `receive` read in place, `take` and `take_within` copy."""

    side, who, peer, _awaits = 1, "receiver", "sender", "the sender's next message"
    held: int = 0
    """Number of messages received in place and not yet released."""
    _frees_at_once: ClassVar[bool] = False
    """Whether a slot is free before the device has copied it out: the sender's device waits then."""

    @abstractmethod
    def poll(self) -> Message | None:
        """The next message in place, or None when there is none now. Never blocks.

        Its tensors share the slot's memory: they are valid until `release`, and not to be written to. On a device they
        are copies already.

        Raises:
            ChannelClosed: this end is closed, or the sender's is and everything it sent was received.
            ChannelBroken: what came is of another generation.
        """

    @abstractmethod
    def receive(self, deadline_s: float) -> Message:
        """As `poll`, but waits for a message, at most ``deadline_s`` seconds; raises ``ChannelTimeout``."""

    def release(self) -> None:
        """Free the oldest slot that is held. Never blocks; raises ``RuntimeError`` where none is."""
        if not self.held:
            raise RuntimeError(f"{self.label}: no message is held, so there is nothing to release")
        self.held -= 1
        if self._frees_at_once:
            self._free()
        else:
            self._once_copied(self._free)

    @abstractmethod
    def _free(self) -> None:
        """Let the sender have the oldest slot held; a closed end has nothing to do. Never blocks."""

    def take(self) -> Message | None:
        """As `poll`, but a copy, its slot already free again; raises ``RuntimeError`` while a message is held."""
        self._require_none_held()
        message = self.poll()
        return None if message is None else self.copied(message)

    def take_within(self, deadline_s: float) -> Message:
        """As `receive`, but a copy, as `take`."""
        self._require_none_held()
        return self.copied(self.receive(deadline_s))

    def _require_none_held(self) -> None:
        if self.held:  # release frees the oldest slot, which would not be the one just copied
            raise RuntimeError(f"{self.label}: {self.held} messages are held in place; release them before a take")

    def copied(self, message: Message) -> Message:
        """A copy of the only message that is held, its slot free again. Never blocks."""
        try:
            return message if self.staging else message.holding(tensor.clone() for tensor in message.tensors)
        finally:
            self.release()

    def _checked(self, message: Message) -> Message:
        """The message; raises ``ChannelBroken`` where it is of another generation than this end."""
        if message.generation != self.generation:
            raise ChannelBroken(
                f"{self.label}: got a message of generation {message.generation} (batch {message.batch}), and this end "
                f"is of generation {self.generation}: a worker from before a restart still sends; end it"
            )
        return message

    def _slot(self, memory: memoryview, channel: ChannelSpec) -> Slot:
        return Slot(memory) if self.staging is None else LandingSlot(memory, self.staging)


@dataclass(frozen=True)
class ChannelKind:
    """One way to carry messages: how its two ends are opened.

    Attributes:
        name: a key of ``pipeline.plan.channel_choice.CHANNELS``.
        ring_slot_bytes: bytes of a slot of its ring in shared memory; None: its ends meet at the run's rendezvous.
    """

    name: str
    sender: Callable[[ChannelSpec, Opening], Sender]
    receiver: Callable[[ChannelSpec, Opening], Receiver]
    ring_slot_bytes: Callable[[ChannelSpec], int] | None = None
