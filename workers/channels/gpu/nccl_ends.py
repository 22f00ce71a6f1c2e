"""A channel between GPUs that share no memory: headers go over gloo, payloads from device to device over a wire.

    computing stream    ... forward | snapshot | dni | backward ...           fetch | forward ...
    sender's lane                       waits: send queued, then the header     ^waits for what has landed
    wire                                  +--------- payload ---------> slot ---+
    gloo                                  +- header -> receive queued                -- credit -->

Everything but the tensors is as in `workers.channels.net.credit_end`: the order, the credits, the end, the death of the
peer. A slot there holds a header only, and where the payload lies in the slot's buffer on the device.

A wire, such as NCCL's, does what it is asked by a kernel that spins until the other side has queued its part. Nobody is
to spin for what may never come, so:

* A send is queued when what it sends is there: it waits for the other process, never for this one's computing.
* A header travels when its send is queued, and the receive is queued when the header is there. So receives match sends
  one to one and in order, and last as long as the transfer; while nothing flows, nothing is queued.
* Credits bound what is queued; a buffer is sent from again when its last send has ended.
* A message is there when its payload is, and the sender's last word is taken in behind all payloads: its answer tells
  the sender that they have arrived, and that its side of the wire may go.
* When gloo says that the peer is gone, the wire is cut, which frees whoever spins; what had not landed is dropped.
"""

from __future__ import annotations

import contextlib
import struct
import time
from functools import partial
from typing import Protocol, Self

import torch
from torch import Tensor

from pipeline.messages.message import ALIGNMENT_BYTES, Layout, Message, decode_over
from workers.channels.net.credit_end import RemoteEnd
from workers.channels.net.ends import RemoteReceiver, RemoteSender
from workers.channels.net.gloo import Meeting, Pair, PairBroken
from workers.channels.slot import Slot
from workers.channels.staging import DeviceStaging, Done, Engine, StagedSlot
from workers.channels.wakeup import WakeUp

__all__ = ["DeviceLink", "LinkEngine", "NcclReceiver", "NcclSender"]

_HEADER_BYTES = 1024
"""Bytes of the largest header: of messages with dozens of tensors."""
_SPAN = struct.Struct("<qq")  # the payload's first byte in the buffer, and the one after its last
_SPAN_AT = 48  # in a slot's record


class DeviceLink(Protocol):
    """Carries bytes from one device to another: one direction, in order, beside the computing."""

    is_cut: bool
    """Whether this side has been cut."""

    def send(self, payload: Tensor) -> Done:
        """Queue sending [bytes] uint8, at least one, that are there; does not block. Their memory is to stay as it is.

        Returns:
            when the memory may be written to again; its ``synchronize`` raises ``PairBroken`` where the wire fails.

        Raises:
            PairBroken: the wire failed, or is cut.
        """

    def receive(self, payload: Tensor) -> Done:
        """Queue receiving as many bytes as the other side sends; else as ``send``."""

    def cut(self) -> None:
        """End what is under way, for good; from any thread. What was being received is garbage, and nobody is told.

        Blocks:
            until the device is free of it, a few seconds at most.
        """


class LinkEngine(Engine, Protocol):
    """What a wire needs of a device besides."""

    def wire(self, meeting: Meeting, name: str, side: int, within_s: float) -> DeviceLink:
        """Connect to the device of the process that asks for the other side of the same name.

        Args:
            meeting: where both meet.
            name: the channel's, used once.
            side: 0 sends, 1 receives.
            within_s: seconds within which both must be connected.

        Raises:
            ChannelTimeout: they were not.
            RuntimeError: these two devices cannot be connected.

        Blocks:
            until connected, at most ``within_s``.
        """


class _OutgoingSlot(StagedSlot):
    """A header that travels over gloo, and a buffer on the device from which the payload is sent."""

    __slots__ = ("_sent", "_wire")

    def __init__(
        self, memory: memoryview, wire_dtype: torch.dtype | None, engine: Engine, wire: DeviceLink, payload_bytes: int
    ) -> None:
        elsewhere = torch.empty(payload_bytes, dtype=torch.uint8, device="meta")
        super().__init__(memory, wire_dtype, engine, elsewhere)
        self._wire, self._sent = wire, _NOTHING

    def write(self, message: Message) -> None:
        """See ``Slot``. A credit has come for what was sent from here before, so its send has ended, or is about to."""
        self._sent.synchronize()
        super().write(message)

    def send_off(self) -> None:
        """Queue the payload of what was written last."""
        if self._used.start < self._used.stop:
            self._sent = self._wire.send(self._staging[self._used])

    def _laid_out(self, layout: Layout, *, narrow: bool) -> None:
        super()._laid_out(layout, narrow=narrow)
        self.used_bytes = ALIGNMENT_BYTES + len(layout.header)
        _SPAN.pack_into(self._record, _SPAN_AT, self._used.start, self._used.stop)


class _IncomingSlot(Slot):
    """The same, as the receiver sees it."""

    __slots__ = ("_payload", "_wire")

    def __init__(self, memory: memoryview, wire: DeviceLink, payload: Tensor) -> None:
        super().__init__(memory)
        self._wire, self._payload = wire, payload

    def receive(self) -> Done:
        """Queue the payload of the message whose header is here; when that is there too."""
        start, stop = _SPAN.unpack_from(self._record, _SPAN_AT)
        if stop > len(self._payload):
            raise PairBroken(
                f"a message of {stop:,} bytes came where slots have {len(self._payload):,}: both must run the same "
                "plan with the same version"
            )
        return self._wire.receive(self._payload[start:stop]) if start < stop else _NOTHING

    def _laid_over(self) -> Message:
        return decode_over(self._body, self._payload)


class _Nothing:
    """What is done already."""

    def synchronize(self) -> None:
        """At once."""


_NOTHING: Done = _Nothing()


class _WireLane(DeviceStaging):
    """A lane whose slots hold headers, and its wire.

    Args:
        engine: of the device, for this lane alone.
        called: the channel, for errors.
        wire: ends with it, by ``cut``.
        payload_bytes: of the largest message.
    """

    end: _WireEnd

    def __init__(self, engine: LinkEngine, called: str, wire: DeviceLink, payload_bytes: int) -> None:
        super().__init__(engine, called)
        self.wire, self._payload_bytes = wire, payload_bytes

    def outgoing(self, memory: memoryview, wire_dtype: torch.dtype | None) -> Slot:
        """See ``Lane``."""
        return _OutgoingSlot(memory, wire_dtype, self.engine, self.wire, self._payload_bytes)

    def incoming(self, memory: memoryview) -> Slot:
        """See ``Lane``."""
        return _IncomingSlot(memory, self.wire, self.engine.empty(self._payload_bytes))

    def pin(self, memory: memoryview) -> None:
        """Only headers lie there, and no device copies them."""

    def fill(self, slot: Slot, message: Message) -> None:
        """See ``Lane``; the payload is sent with the header."""
        self._check()
        slot.write(message)

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, PairBroken):
            super()._fail(error)
        self.end.break_off(error)


class _WireEnd(RemoteEnd):
    """What both ends share."""

    @classmethod
    def join(
        cls,
        meeting: Meeting,
        name: str,
        *,
        label: str,
        slots: int,
        slot_bytes: int,
        deadline_s: float,
        engine: LinkEngine,
        bell: WakeUp | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> Self:
        """Meet the other end, as ``RemoteEnd.attach``, and connect its device and this one's.

        Args:
            meeting: where both meet.
            name: the channel's, used once.
            label: what errors call the channel, like ``"activations 0->1"``.
            slots: how many messages fit.
            slot_bytes: largest ``layout_of(message).total_bytes``, as narrowed: what each slot takes on the device.
            deadline_s: seconds from now within which the other end must come, and again for what ``engine.wire`` does.
            engine: of this worker's device, for this end alone.
            bell: this worker's, rung when a message or a release has arrived, and when the channel closes or breaks.
            wire_dtype: what float32 activations and gradients are narrowed to; None: they travel as they are.

        Raises:
            ChannelTimeout: it did not come, or the devices did not connect.
            ValueError: the ends do not agree on the slots.
            RuntimeError: as ``LinkEngine.wire``.

        Blocks:
            until the other end is there, at most three times ``deadline_s``: to connect twice, and to greet.
        """
        with contextlib.ExitStack() as undo:
            pair = Pair.join(meeting, name, cls.side, deadline_s)
            undo.callback(pair.cut)
            wire = engine.wire(meeting, name, cls.side, deadline_s)
            undo.callback(wire.cut)
            lane = _WireLane(engine, label, wire, slot_bytes)
            undo.callback(lane.close)
            end = cls(
                pair, label=label, slots=slots, slot_bytes=_HEADER_BYTES, bell=bell, wire_dtype=wire_dtype, lane=lane
            )
            lane.end = end
            end.start(deadline_s)
            undo.pop_all()
        return end

    @property
    def wire(self) -> DeviceLink:
        """What carries the payloads."""
        assert isinstance(self.lane, _WireLane), "made by join"
        return self.lane.wire

    def break_off(self, error: Exception) -> None:
        """A payload will not arrive: neither end goes on."""
        self._lose(error if isinstance(error, PairBroken) else PairBroken(str(error)))

    def _lose(self, error: PairBroken) -> None:
        super()._lose(error)
        self._pair.cut()  # where it was not lost, but the wire: the other end hears of it at once
        self.wire.cut()


class NcclSender(_WireEnd, RemoteSender):
    """The sending end; see ``Sender``. Use ``join``."""

    def _ship_next(self) -> None:
        with self._changed:  # a header goes with its payload, or neither does
            if not self._said_end and self._broken is None:
                slot = self._slots[self._num_shipped % self._ring_size]
                assert isinstance(slot, _OutgoingSlot), "made by the lane"
                slot.send_off()
            super()._ship_next()

    def _wind_up(self) -> None:
        super()._wind_up()
        self.wire.cut()


class NcclReceiver(_WireEnd, RemoteReceiver):
    """The receiving end; see ``Receiver``. Use ``join``."""

    def _take_in(self, index: int) -> bool:
        slot = self._slots[index]
        assert isinstance(slot, _IncomingSlot), "made by the lane"
        self._heard = time.monotonic()
        last = slot.is_end
        assert isinstance(self.lane, _WireLane), "made by join"
        self.lane.after(_NOTHING if last else slot.receive(), partial(self._landed, index))
        return not last

    def _landed(self, index: int) -> None:
        """A header and its payload are there; in the lane's thread."""
        if not self.wire.is_cut:
            super()._take_in(index)

    def _wind_up(self) -> None:
        """Payloads under way land first, so that no sender is left with them: the end of the queue answers the peer."""
        self._part()
        if not self._peer_ended:
            self.wire.cut()
        self.lane.close()
        self.wire.cut()
