"""A channel between GPUs that share no memory: headers go over gloo, payloads from device to device over a wire.

    computing stream    ... forward | snapshot | dni | backward ...           fetch | forward ...
    sender's staging                    waits: send queued, then the header     ^waits for what has landed
    wire                                  +--------- payload ---------> slot ---+
    gloo                                  +- header -> receive queued                -- credit -->

Everything but the tensors is as in `workers.channels.net.credit_end`: the order, the credits, the end, the death of the
peer. A slot there holds a header only, and where the payload lies in the slot's buffer on the device.

NCCL's kernels spin until the other side has queued its part. Nobody is to spin for what may never come, so:

* A send is queued when what it sends is there: it waits for the other process, never for this one's computing.
* A header travels when its send is queued, and the receive is queued when the header is there: receives match sends one
  to one and in order, and while nothing flows, nothing is queued. Credits bound what is queued.
* A message is there when its payload is, and the sender's last word is taken in behind all payloads: its answer tells
  the sender that they have arrived, and that its side of the wire may go.
* When gloo says that the peer is gone, the wire is cut, which frees whoever spins; what had not landed is dropped.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.messages.message import ALIGNMENT_BYTES, Layout, Message
from workers.channels.engine import DeviceLink, Done
from workers.channels.interface import ChannelKind
from workers.channels.net.credit_end import RemoteEnd
from workers.channels.net.ends import RemoteReceiver, RemoteSender
from workers.channels.net.gloo import Meeting, PairBroken
from workers.channels.slot import Slot
from workers.channels.spec import ChannelSpec
from workers.channels.staging import DeviceStaging, LandingSlot, StagedSlot

__all__ = ["NCCL", "NcclReceiver", "NcclSender"]

_HEADER_BYTES = 1024
"""Bytes of the largest header: of messages with dozens of tensors."""
_SPAN = struct.Struct("<qq")  # the payload's first byte in the buffer, and the one after its last
_SPAN_AT = 48  # in a slot's record


class _OutgoingSlot(StagedSlot):
    """A header that travels over gloo, and a buffer on the device from which the payload is sent."""

    def __init__(self, memory: memoryview, channel: ChannelSpec, staging: DeviceStaging, wire: DeviceLink) -> None:
        elsewhere = torch.empty(channel.slot_bytes, dtype=torch.uint8, device="meta")
        super().__init__(memory, channel.wire_dtype, staging, elsewhere)
        self._wire = wire
        self._sent: Done | None = None

    def write(self, message: Message) -> None:
        """A credit has come for what was sent from here before, so its send has ended, or is about to."""
        self._staging.check()
        if self._sent is not None:
            self._sent.synchronize()
        Slot.write(self, message)  # the payload is sent with the header

    def send_off(self) -> None:
        """Queue the payload of what was written last."""
        if self._used.start < self._used.stop:
            self._sent = self._wire.send(self._buffer[self._used])

    def _laid_out(self, layout: Layout, *, narrow: bool) -> None:
        super()._laid_out(layout, narrow=narrow)
        self.used_bytes = ALIGNMENT_BYTES + len(layout.header)
        _SPAN.pack_into(self._record, _SPAN_AT, self._used.start, self._used.stop)


class _IncomingSlot(LandingSlot):
    """The same, as the receiver sees it."""

    _payload: Tensor

    def __init__(self, memory: memoryview, channel: ChannelSpec, staging: DeviceStaging, wire: DeviceLink) -> None:
        super().__init__(memory, staging, staging.engine.empty(channel.slot_bytes))
        self._wire = wire

    def receive(self) -> Done | None:
        """Queue the payload of the message whose header is here: when that is there too; None: it has no payload."""
        start, stop = _SPAN.unpack_from(self._record, _SPAN_AT)
        if stop > len(self._payload):
            raise PairBroken(
                f"a message of {stop:,} bytes came where slots have {len(self._payload):,}: both must run the same "
                "plan with the same version"
            )
        return self._wire.receive(self._payload[start:stop]) if start < stop else None


class _WireEnd(RemoteEnd):
    """What both ends share: besides what a ``RemoteEnd`` has, the link between the devices.

    Raises also ``ChannelTimeout`` where the devices did not connect, after at most ``opening.within_s`` more, and
    ``RuntimeError`` where they cannot be connected.
    """

    staging: DeviceStaging
    wire: DeviceLink
    _header_bytes = _HEADER_BYTES

    def _connect(self, meeting: Meeting, channel: ChannelSpec, within_s: float) -> None:
        self.wire = self.staging.engine.wire(meeting, channel.meets_as, self.side, within_s)
        self.staging.on_failure = self._break_off

    def _break_off(self, error: Exception) -> None:
        """A payload will not arrive: neither end goes on."""
        if not isinstance(error, PairBroken):
            self.staging.spoil(error)
            error = PairBroken(str(error))
        self._lose(error)

    def _lose(self, error: PairBroken) -> None:
        super()._lose(error)
        self._cut()  # where it was not lost, but the wire: the other end hears of it at once

    def _cut(self) -> None:
        super()._cut()
        if hasattr(self, "wire"):  # it may be what could not be connected
            self.wire.cut()


class NcclSender(_WireEnd, RemoteSender):
    """The sending end."""

    _slots: Sequence[_OutgoingSlot]

    def _slot(self, memory: memoryview, channel: ChannelSpec) -> _OutgoingSlot:
        return _OutgoingSlot(memory, channel, self.staging, self.wire)

    def _ship_next(self) -> None:
        with self._changed:  # a header goes with its payload, or neither does
            if not self._said_end and self._broken is None:
                self._slots[self._num_shipped % self._ring_size].send_off()
            super()._ship_next()


class NcclReceiver(_WireEnd, RemoteReceiver):
    """The receiving end."""

    _slots: Sequence[_IncomingSlot]

    def _slot(self, memory: memoryview, channel: ChannelSpec) -> _IncomingSlot:
        return _IncomingSlot(memory, channel, self.staging, self.wire)

    def _take_in(self, index: int) -> bool:
        self._heard = time.monotonic()
        last = self._slots[index].is_end
        done = None if last else self._slots[index].receive()
        self.staging.after(done, partial(self._landed, index))
        return not last

    def _landed(self, index: int) -> None:
        """A header and its payload are there; in the staging's thread."""
        if not self.wire.is_cut:
            super()._take_in(index)

    def _wind_up(self) -> None:
        """Payloads under way land first, so that no sender is left with them: the end of the queue answers the peer."""
        self._part()
        if not self._peer_ended:
            self.wire.cut()
        self._drain()


NCCL = ChannelKind("nccl", NcclSender, NcclReceiver)
"""Between workers on GPUs of two hosts, where torch has NCCL."""
