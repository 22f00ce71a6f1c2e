"""CUDA peer memory: a channel between workers on GPUs of one host, or on the same GPU. No byte goes through the host.

    ring in shared memory (workers.channels.shm.ring)          memory of the receiver's GPU
    | card | header 0 | header 1 | ... |         | payload 0 | payload 1 | ... |
      ^ handle of the payloads                     ^ the sender's GPU copies into it, the receiver's out of it
               ^ handle of an event: copied out

The slots of the ring hold headers only. The payloads belong to the receiver, who outlives what was sent to it; handles
of its memory and of its events lie in the ring before the first message, as CUDA gives them. A message is posted when
the sender's copy has ended; a slot is posted free as soon as the receiver's copy is queued, and on the device the
sender's next copy into it waits for the event.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from pipeline.messages.message import Message
from workers.channels.errors import ChannelTimeout
from workers.channels.interface import ChannelKind
from workers.channels.shm.ring import ShmReceiver, ShmSender
from workers.channels.slot import Slot, slot_stride
from workers.channels.spec import ChannelSpec
from workers.channels.staging import DeviceStaging, LandingSlot, StagedSlot
from workers.channels.wakeup import POLL_S

__all__ = ["CUDA_IPC", "HEADER_SLOT_BYTES", "PeerReceiver", "PeerSender"]

HEADER_SLOT_BYTES = 1024
"""Bytes of a slot of the ring: a message's header, and behind it the handle of an event."""
_EVENT_BYTES = 64


class _OutgoingSlot(StagedSlot):
    """A header in the ring, a payload on the receiver's device."""

    def __init__(self, memory: memoryview, channel: ChannelSpec, staging: DeviceStaging, payload: Tensor) -> None:
        super().__init__(memory[:-_EVENT_BYTES], channel.wire_dtype, staging, payload)
        self._free = staging.engine.opened_signal(bytes(memory[-_EVENT_BYTES:]))

    def send_off(self) -> None:
        self._staging.engine.wait(self._free)
        super().send_off()


class _IncomingSlot(LandingSlot):
    """The same, as the receiver sees it."""

    def __init__(self, memory: memoryview, staging: DeviceStaging, payload: Tensor) -> None:
        super().__init__(memory[:-_EVENT_BYTES], staging, payload)
        self._free, memory[-_EVENT_BYTES:] = staging.engine.signal()

    def read(self) -> Message:
        message = super().read()
        self._staging.engine.record(self._free)
        return message


class PeerSender(ShmSender):
    """The sending end.

    Raises:
        ChannelTimeout: there is no such ring, or its receiver did not come, each in ``opening.within_s``.
        RuntimeError: this device cannot reach the other one's memory.
    """

    staging: DeviceStaging
    _header_bytes = HEADER_SLOT_BYTES

    def _slots_over(self, memories: Sequence[memoryview], channel: ChannelSpec, within_s: float) -> list[Slot]:
        staging, stride = self.staging, slot_stride(channel.slot_bytes)
        payloads = staging.engine.opened(self._awaited_card(within_s), len(memories) * stride).view(-1, stride)
        places = zip(memories, payloads[:, : channel.slot_bytes], strict=True)
        return [_OutgoingSlot(memory, channel, staging, payload) for memory, payload in places]

    def _awaited_card(self, deadline_s: float) -> bytes:
        """The handle of the payloads, once the receiver has written it, behind its length."""
        until = time.monotonic() + deadline_s
        while not (length := self._card[0]):
            if time.monotonic() > until:
                raise ChannelTimeout(
                    f"{self.label}: the receiver has not offered memory of its device within {deadline_s:.3g} s: is "
                    "its worker alive?"
                )
            time.sleep(POLL_S)
        return bytes(self._card[1 : 1 + length])


class PeerReceiver(ShmReceiver):
    """The receiving end."""

    staging: DeviceStaging
    _header_bytes, _frees_at_once = HEADER_SLOT_BYTES, True

    def _slots_over(self, memories: Sequence[memoryview], channel: ChannelSpec, within_s: float) -> list[Slot]:
        staging, stride = self.staging, slot_stride(channel.slot_bytes)
        memory, handle = staging.engine.shareable(len(memories) * stride)
        places = zip(memories, memory.view(-1, stride)[:, : channel.slot_bytes], strict=True)
        slots: list[Slot] = [_IncomingSlot(header, staging, payload) for header, payload in places]
        self._card[1 : 1 + len(handle)] = handle
        self._card[0] = len(handle)  # last: who sees it sees everything
        return slots


CUDA_IPC = ChannelKind("cuda", PeerSender, PeerReceiver, lambda channel: HEADER_SLOT_BYTES)
"""Between workers on GPUs of one host."""
