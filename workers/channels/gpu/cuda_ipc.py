"""CUDA peer memory: a channel between workers on GPUs of one host, or on the same GPU. No byte goes through the host.

    ring in shared memory (workers.channels.shm.ring)          memory of the receiver's GPU
    | card | header 0 | header 1 | ... |         | payload 0 | payload 1 | ... |
      ^ handle of the payloads                     ^ the sender's GPU copies into it, the receiver's out of it
               ^ handle of an event: copied out

The ring is the same, with the same semaphores, but its slots hold headers only. The payloads belong to the receiver,
who outlives what was sent to it; handles of its memory and of its events lie in the ring before the first message, as
CUDA gives them, nothing pickled. A message is posted when the sender's copy has ended; a slot is posted free as soon as
the receiver's copy is queued, and on the device the sender's next copy into it waits for the event.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pipeline.messages.message import Message, decode_over
from workers.channels.errors import ChannelTimeout
from workers.channels.shm.ring import CARD, RECEIVER_ATTACHED, SENDER_ATTACHED, ShmReceiver, ShmSender
from workers.channels.slot import Slot, slot_stride
from workers.channels.staging import DeviceStaging, Engine, StagedSlot
from workers.channels.wakeup import LOOK_FOR_NAME_EVERY_S, WakeUp

__all__ = ["HEADER_SLOT_BYTES", "PeerEngine", "PeerReceiver", "PeerSender", "Signal"]

HEADER_SLOT_BYTES = 1024
"""Bytes of a slot of the ring: a message's header, and behind it the handle of an event."""
_EVENT_BYTES = 64
_CARD = struct.Struct("<B")  # length of the handle that follows, once it is there


class Signal(Protocol):
    """An event that processes share: recorded by the receiver, waited for by the sender's device."""


class PeerEngine(Engine, Protocol):
    """What peer memory needs of a device besides."""

    def shareable(self, num_bytes: int) -> tuple[Tensor, bytes]:
        """[num_bytes] uint8 on the device, and a handle for other processes, at most 255 bytes.

        It lives as long as the process: others may still copy into it.
        """

    def opened(self, handle: bytes, num_bytes: int) -> Tensor:
        """[num_bytes] uint8: the memory that another engine shares, of this or another process."""

    def signal(self) -> tuple[Signal, bytes]:
        """A new event, and its handle of 64 bytes."""

    def opened_signal(self, handle: bytes) -> Signal:
        """The event that another engine made."""

    def record(self, signal: Signal) -> None:
        """The copying stream is here."""

    def wait(self, signal: Signal) -> None:
        """The copying stream goes on when the last ``record`` before this call is reached; the host does not wait."""


class _OutgoingSlot(StagedSlot):
    """A header in the ring, a payload on the receiver's device."""

    __slots__ = ("_free", "_peer")

    def __init__(
        self, memory: memoryview, wire_dtype: torch.dtype | None, engine: PeerEngine, payload: Tensor, free: Signal
    ) -> None:
        super().__init__(memory[:-_EVENT_BYTES], wire_dtype, engine, payload)
        self._peer, self._free = engine, free

    def send_off(self) -> None:
        self._peer.wait(self._free)
        super().send_off()


class _IncomingSlot(Slot):
    """The same, as the receiver sees it."""

    __slots__ = ("_payload", "signal")

    def __init__(self, memory: memoryview, payload: Tensor, signal: Signal) -> None:
        super().__init__(memory[:-_EVENT_BYTES])
        self._payload, self.signal = payload, signal

    def _laid_over(self) -> Message:
        return decode_over(self._body, self._payload)


class _PeerLane(DeviceStaging):
    """A lane whose slots are free as soon as the device knows that they are."""

    def __init__(self, engine: PeerEngine, called: str) -> None:
        super().__init__(engine, called)
        self._peer = engine

    def pin(self, memory: memoryview) -> None:
        """Only headers lie there, and no device copies them."""

    def land(self, slot: Slot) -> Message:
        """See ``Lane``."""
        assert isinstance(slot, _IncomingSlot), "made by the receiver"
        message = super().land(slot)
        self._peer.record(slot.signal)
        return message


class _IncomingLane(_PeerLane):
    def then(self, call: Callable[[], None]) -> None:
        """At once: what is to be waited for is on the device."""
        call()


class PeerSender(ShmSender):
    """The sending end; see `Sender`. Use `join`."""

    @classmethod
    def join(
        cls,
        name: str,
        *,
        label: str,
        slot_bytes: int,
        deadline_s: float,
        engine: PeerEngine,
        receiver_bell: WakeUp | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> PeerSender:
        """Open the sending end of a ring with slots of ``HEADER_SLOT_BYTES``; as ``ShmSender.attach`` besides.

        Whoever opens several ends does so in an order common to all processes.

        Args:
            name: the ring's.
            label: what errors call the channel.
            slot_bytes: largest ``layout_of(message).total_bytes``, as narrowed.
            deadline_s: seconds from now within which the ring must exist, and again the receiver be there.
            engine: of this worker's device, for this end alone.
            receiver_bell: rung after each send and at close.
            wire_dtype: what float32 activations and gradients are narrowed to.

        Raises:
            ChannelTimeout: there is no such ring, or its receiver did not come.
            RuntimeError: this device cannot reach the other one's memory.

        Blocks:
            until the receiver has opened its end.
        """
        lane = _PeerLane(engine, label)
        end: PeerSender | None = None
        try:
            end = cls(name, label, deadline_s, SENDER_ATTACHED, receiver_bell, lane)
            handle, stride = end._awaited_card(deadline_s), slot_stride(slot_bytes)
            payloads = engine.opened(handle, end.capacity * stride).view(end.capacity, stride)
            for memory, payload in zip(end._memories, payloads, strict=True):
                free = engine.opened_signal(bytes(memory[-_EVENT_BYTES:]))
                end._slots.append(_OutgoingSlot(memory, wire_dtype, engine, payload[:slot_bytes], free))
        except BaseException:
            (end or lane).close()
            raise
        return end

    def _awaited_card(self, deadline_s: float) -> bytes:
        """The handle of the payloads, once the receiver has written it."""
        until = time.monotonic() + deadline_s
        while True:
            (length,) = _CARD.unpack_from(self._header, CARD)
            if length:
                return bytes(self._header[CARD + _CARD.size :][:length])
            if time.monotonic() > until:
                raise ChannelTimeout(
                    f"{self.label}: the receiver has not offered memory of its device within {deadline_s:.3g} s: is "
                    "its worker alive?"
                )
            time.sleep(LOOK_FOR_NAME_EVERY_S)


class PeerReceiver(ShmReceiver):
    """The receiving end; see `Receiver`. Use `join`."""

    @classmethod
    def join(
        cls,
        name: str,
        *,
        label: str,
        slot_bytes: int,
        deadline_s: float,
        engine: PeerEngine,
        sender_bell: WakeUp | None = None,
    ) -> PeerReceiver:
        """Open the receiving end; as ``PeerSender.join``, but waits for the ring alone."""
        lane = _IncomingLane(engine, label)
        end: PeerReceiver | None = None
        try:
            end = cls(name, label, deadline_s, RECEIVER_ATTACHED, sender_bell, lane)
            stride = slot_stride(slot_bytes)
            memory, handle = engine.shareable(end.capacity * stride)
            for header, payload in zip(end._memories, memory.view(end.capacity, stride), strict=True):
                signal, event = engine.signal()
                header[-_EVENT_BYTES:] = event
                end._slots.append(_IncomingSlot(header, payload[:slot_bytes], signal))
            end._header[CARD + _CARD.size :][: len(handle)] = handle
            _CARD.pack_into(end._header, CARD, len(handle))  # last: who sees it sees everything
        except BaseException:
            (end or lane).close()
            raise
        return end
