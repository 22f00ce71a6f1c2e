"""How a message gets between a worker's tensors and the slots of one end of a channel.

    Direct        CPU tensors: written into the slot and read in place, there and then
    DeviceLane    tensors of a device: copied by it, beside the computing, while the worker goes on

A message of a device takes two copies on each side of a hop, and none of them holds the computing up:

    computing stream   ... forward | snapshot | dni | backward ...                ... | forward
                                        |ready                               fetched^
    copying stream                      +--> copy to the slot --+      +--> fetch --+
    the lane's thread                                    waits: post   |        waits: release
                                                                  v    |             v
    slot               ------------------------------------------ full |------------ empty

The snapshot is a copy within the device, of microseconds; from then on the sent tensors may be changed or freed. It is
narrowed on the way, so what crosses a bus is what travels. A message is posted when its bytes are in the slot: nobody
is told of a message and then has to wait for it. A slot is released when the device has copied it out.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.messages.message import Message, decode_over, layout_of
from pipeline.plan.channel_choice import narrowed, widened
from workers.channels.errors import ChannelBroken
from workers.channels.slot import Slot

__all__ = ["NO_STAGING", "DeviceStaging", "Done", "Engine", "NoStaging", "StagedSlot", "Staging"]

_DRAIN_WITHIN_S = 10.0


class Staging(ABC):
    """What an end asks for; see ``NoStaging`` and ``DeviceStaging``. Of one end, and of one thread."""

    @abstractmethod
    def outgoing(self, memory: memoryview, wire_dtype: torch.dtype | None) -> Slot:
        """A slot to send from; memory as for ``Slot``."""

    @abstractmethod
    def incoming(self, memory: memoryview) -> Slot:
        """A slot to receive in."""

    @abstractmethod
    def pin(self, memory: memoryview) -> None:
        """All slots lie in this memory, until ``close``."""

    @abstractmethod
    def fill(self, slot: Slot, message: Message) -> None:
        """Copy a message into a slot; it is there when what ``then`` is given next is called.

        Raises:
            ValueError: it is larger than the slot.
            TypeError: a tensor's dtype cannot travel.
        """

    @abstractmethod
    def land(self, slot: Slot) -> Message:
        """The message in a slot, where the worker computes: in place there, or already a copy."""

    @abstractmethod
    def before_landing(self, call: Callable[[int], None]) -> None:
        """From now on call with the batch id before computing has to wait for a copy in ``land``."""

    @abstractmethod
    def own(self, message: Message) -> Message:
        """What ``land`` gave, as a copy."""

    @abstractmethod
    def then(self, call: Callable[[], None]) -> None:
        """Call, once what was given to ``fill`` and ``land`` so far is copied; in the order of these calls."""

    @abstractmethod
    def close(self) -> None:
        """Wait until everything was called, a few seconds at most; later calls are made at once."""


class NoStaging(Staging):
    """CPU tensors. Keeps nothing, so one serves all ends."""

    def outgoing(self, memory: memoryview, wire_dtype: torch.dtype | None) -> Slot:
        """See ``Staging``."""
        return Slot(memory, wire_dtype)

    def incoming(self, memory: memoryview) -> Slot:
        """See ``Staging``."""
        return Slot(memory)

    def pin(self, memory: memoryview) -> None:
        """Nothing to do."""

    def fill(self, slot: Slot, message: Message) -> None:
        """See ``Staging``."""
        slot.write(message)

    def land(self, slot: Slot) -> Message:
        """In place."""
        return slot.read()

    def before_landing(self, call: Callable[[int], None]) -> None:
        """Computing never has to."""

    def own(self, message: Message) -> Message:
        """See ``Staging``."""
        return message.holding(tensor.clone() for tensor in message.tensors)

    def then(self, call: Callable[[], None]) -> None:
        """At once."""
        call()

    def close(self) -> None:
        """Nothing is under way."""


NO_STAGING = NoStaging()


class Done(Protocol):
    """A point in the work of a copying stream."""

    def synchronize(self) -> None:
        """Wait until the device has come there; lets other threads run."""


class Engine(Protocol):
    """What a lane needs of a device: one stream that copies, beside the one that computes."""

    def empty(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 on the device."""

    def pin(self, memory: memoryview) -> Callable[[], None]:
        """Have the device copy to and from host memory by itself; returns what ends that."""

    def snapshot(self, into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Copy on the computing stream; later copies wait for it."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy on the copying stream."""

    def fetch(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """New tensors on the device, copied on the copying stream; the computing stream waits for it."""

    def mark(self) -> Done:
        """Where the copying stream is now."""


class StagedSlot(Slot):
    """A slot that a device fills: header by the host, tensors through a buffer on the device.

    Args:
        memory: of the header; as for ``Slot``.
        wire_dtype: as for ``Slot``.
        engine: of the device.
        payload: [bytes] uint8 where the tensors' bytes are to be, in step with the slot's; on the host or a device.
    """

    __slots__ = ("_engine", "_payload", "_staging", "_used")

    def __init__(self, memory: memoryview, wire_dtype: torch.dtype | None, engine: Engine, payload: Tensor) -> None:
        super().__init__(memory, wire_dtype)
        self._engine, self._payload, self._staging = engine, payload, engine.empty(len(payload))
        self._used = slice(0)

    def _lay_out(self, message: Message) -> None:
        sent = narrowed(message, self._wire_dtype)
        layout = layout_of(sent)
        self._check_fits(layout.total_bytes, len(self._payload))
        self._check_fits(len(layout.header), len(self._body))
        self._body[: len(layout.header)] = layout.header
        with torch.inference_mode(False):
            self._tensors = decode_over(self._body, self._staging).tensors
        self._used = slice(layout.offsets[0] if layout.offsets else layout.total_bytes, layout.total_bytes)
        self._laid_out(layout, narrow=sent is not message)
        self._copy_in(message)

    def _copy_in(self, message: Message) -> None:
        self._engine.snapshot(self._tensors, message.tensors)

    def send_off(self) -> None:
        """Copy what was written last from the device's buffer to where it is to be."""
        if self._used.start < self._used.stop:
            self._engine.copy(self._payload[self._used], self._staging[self._used])


class DeviceStaging(Staging):
    """Tensors of a device, and the thread that waits for its copies.

    Args:
        engine: of the device, for this lane alone.
        called: the channel, for errors.
    """

    def __init__(self, engine: Engine, called: str) -> None:
        self.engine, self._called = engine, called
        self._unpin: Callable[[], None] | None = None
        self._landing: Callable[[int], None] = _nobody
        self._failed: Exception | None = None
        self._closed = False
        self._closing = threading.Lock()  # whatever is queued comes before the end of the queue
        self._waiting: queue.SimpleQueue[tuple[Done, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name=f"{called}, copies", daemon=True)
        self._thread.start()

    def outgoing(self, memory: memoryview, wire_dtype: torch.dtype | None) -> Slot:
        """See ``Staging``; the tensors lie behind the record, as in any slot."""
        slot = Slot(memory)
        return StagedSlot(memory, wire_dtype, self.engine, torch.frombuffer(slot.body, dtype=torch.uint8))

    def incoming(self, memory: memoryview) -> Slot:
        """See ``Staging``."""
        return Slot(memory)

    def pin(self, memory: memoryview) -> None:
        """See ``Staging``; the device then copies without the host's help."""
        self._unpin = self.engine.pin(memory)

    def fill(self, slot: Slot, message: Message) -> None:
        """See ``Staging``; raises ``ChannelBroken`` where an earlier copy failed."""
        self._check()
        assert isinstance(slot, StagedSlot), "made by outgoing"
        slot.write(message)
        slot.send_off()

    def land(self, slot: Slot) -> Message:
        """A copy on the device; raises as ``fill``."""
        self._check()
        message, narrow = slot.read_narrow()
        self._landing(message.batch)
        message = message.holding(self.engine.fetch(message.tensors))
        return widened(message) if narrow else message

    def before_landing(self, call: Callable[[int], None]) -> None:
        """See ``Staging``."""
        self._landing = call

    def own(self, message: Message) -> Message:
        """It is one."""
        return message

    def then(self, call: Callable[[], None]) -> None:
        """See ``Staging``; from the lane's thread."""
        if self._closed:
            call()
        else:
            self.after(self.engine.mark(), call)

    def after(self, done: Done, call: Callable[[], None]) -> None:
        """As ``then``, but once the device has come to ``done``; from any thread."""
        with self._closing:
            if not self._closed:
                self._waiting.put((done, call))
                return
        call()

    def close(self) -> None:
        """See ``Staging``; 10 s at most."""
        if not self._closed:
            with self._closing:
                self._closed = True
                self._waiting.put(None)
            self._thread.join(_DRAIN_WITHIN_S)
            if self._unpin is not None and not self._thread.is_alive():
                self._unpin()

    def _check(self) -> None:
        if self._failed is not None:
            raise ChannelBroken(
                f"{self._called}: a copy of an earlier message failed: {self._failed}. Errors of a device come late: "
                "look for what it computed before (CUDA_LAUNCH_BLOCKING=1 tells where)"
            ) from self._failed

    def _wait(self) -> None:
        while (item := self._waiting.get()) is not None:
            done, call = item
            try:
                done.synchronize()
                call()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """What was waited for failed; from the lane's thread."""
        self._failed = self._failed or error


def _nobody(batch: int) -> None:
    """Nobody wants to know."""
