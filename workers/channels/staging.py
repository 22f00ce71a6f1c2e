"""How a message gets between the tensors of a device and the slots of one end of a channel; the CPU needs none of it.

A message takes two copies on each side of a hop, and none of them holds the computing up:

    computing stream   ... forward | snapshot | dni | backward ...                ... | forward
                                        |ready                               fetched^
    copying stream                      +--> copy to the slot --+      +--> fetch --+
    the staging's thread                                 waits: post   |        waits: release
                                                                  v    |             v
    slot               ------------------------------------------ full |------------ empty

The snapshot is a copy within the device, of microseconds, and narrowed on the way; from then on the sent tensors may be
changed or freed. A message is posted when its bytes are in the slot, a slot released when the device has copied it out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.messages.message import Layout, Message, decode_over
from pipeline.plan.channel_choice import widened
from workers.channels.engine import Done, Engine
from workers.channels.errors import ChannelBroken
from workers.channels.slot import Slot

__all__ = ["DeviceStaging", "LandingSlot", "StagedSlot"]

_DRAIN_WITHIN_S = 10.0


class DeviceStaging:
    """The thread of one end that waits for its device's copies. Else of the end's own thread.

    ``engine`` is for this end alone, ``called`` the channel in errors.

    Attributes:
        before_landing: called with the batch id before computing has to wait for a received message.
        on_failure: called, from the staging's thread, with what was raised by what it waited for or called.
    """

    def __init__(self, engine: Engine, called: str) -> None:
        self.engine, self._called = engine, called
        self.before_landing: Callable[[int], None] = lambda batch: None
        self.on_failure = self.spoil
        self._unpin: Callable[[], None] | None = None
        self._failed: Exception | None = None
        self._closed = False
        self._closing = threading.Lock()  # whatever is queued comes before the end of the queue
        self._waiting: queue.SimpleQueue[tuple[Done | None, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name=f"{called}, copies", daemon=True)
        self._thread.start()

    def pin(self, memory: memoryview) -> None:
        """Have the device copy to and from this memory without the host's help, until ``close``."""
        self._unpin = self.engine.pin(memory)

    def then(self, call: Callable[[], None]) -> None:
        """Call, from the staging's thread, once what was copied so far is there; in the order of these calls."""
        if self._closed:
            call()
        else:
            self.after(self.engine.mark(), call)

    def after(self, done: Done | None, call: Callable[[], None]) -> None:
        """As ``then``, but once the device has come to ``done``, if given; from any thread."""
        with self._closing:
            if not self._closed:
                self._waiting.put((done, call))
                return
        call()

    def close(self) -> None:
        """Wait until everything was called, 10 s at most; later calls are made at once."""
        if not self._closed:
            with self._closing:
                self._closed = True
                self._waiting.put(None)
            self._thread.join(_DRAIN_WITHIN_S)
            if self._unpin is not None and not self._thread.is_alive():
                self._unpin()

    def check(self) -> None:
        """Raises ``ChannelBroken`` where an earlier copy failed."""
        if self._failed is not None:
            raise ChannelBroken(
                f"{self._called}: a copy of an earlier message failed: {self._failed}. Errors of a device come late: "
                "look for what it computed before (CUDA_LAUNCH_BLOCKING=1 tells where)"
            ) from self._failed

    def spoil(self, error: Exception) -> None:
        """A copy failed: ``check`` raises from now on."""
        self._failed = self._failed or error

    def _wait(self) -> None:
        while (item := self._waiting.get()) is not None:
            done, call = item
            try:
                if done is not None:
                    done.synchronize()
                call()
            except Exception as error:
                self.on_failure(error)


class StagedSlot(Slot):
    """A slot to send from that a device fills: header by the host, tensors through a buffer on the device.

    ``payload`` is [bytes] uint8 where the tensors' bytes are to be, in step with the slot's; on the host or a device.
    None: behind the header, as in any slot.
    """

    def __init__(
        self, memory: memoryview, wire_dtype: torch.dtype | None, staging: DeviceStaging, payload: Tensor | None = None
    ) -> None:
        super().__init__(memory, wire_dtype)
        self._payload = torch.frombuffer(self._body, dtype=torch.uint8) if payload is None else payload
        self._payload_bytes = len(self._payload)
        self._staging, self._buffer, self._used = staging, staging.engine.empty(self._payload_bytes), slice(0)

    def write(self, message: Message) -> None:
        """As ``Slot``; the tensors are there when what ``DeviceStaging.then`` is given next is called."""
        self._staging.check()
        super().write(message)
        self.send_off()

    def send_off(self) -> None:
        """Copy what was written last from the device's buffer to where it is to be."""
        if self._used.start < self._used.stop:
            self._staging.engine.copy(self._payload[self._used], self._buffer[self._used])

    def _laid_out(self, layout: Layout, *, narrow: bool) -> None:
        super()._laid_out(layout, narrow=narrow)
        self._used = slice(layout.offsets[0] if layout.offsets else layout.total_bytes, layout.total_bytes)

    def _laid_over(self) -> Message:
        return decode_over(self._body, self._buffer)

    def _copy_in(self, message: Message) -> None:
        self._staging.engine.snapshot(self._tensors, message.tensors)


class LandingSlot(Slot):
    """A slot to receive in whose messages are read as copies on a device; ``payload`` as for `StagedSlot`."""

    def __init__(self, memory: memoryview, staging: DeviceStaging, payload: Tensor | None = None) -> None:
        super().__init__(memory)
        self._staging, self._payload = staging, payload

    def read(self) -> Message:
        """The message, copied to the device; raises ``ChannelBroken`` where an earlier copy failed."""
        self._staging.check()
        message, narrow = self.read_narrow()
        self._staging.before_landing(message.batch)
        message = message.holding(self._staging.engine.fetch(message.tensors))
        return widened(message) if narrow else message

    def _laid_over(self) -> Message:
        return super()._laid_over() if self._payload is None else decode_over(self._body, self._payload)
