"""The shared memory ring: a channel between two processes of one host. Linux.

    segment fw-<driver pid>-...    semaphores ...-e: empty slots (sender waits), ...-f: filled (receiver)
    | sizes, closed flags | slot 0 | slot 1 | ... |

One copy in (the sender's), read in place, two counting semaphores, no threads. Each side keeps its own place in the
ring; the post and wait of the semaphores order the memory. Everything has a name, so that processes without a common
parent can attach; once both have, `unlink_ring` removes the names while the memory lives on, and even `kill -9` of all
leaves nothing behind. A peer killed by SIGKILL cannot be seen from here: deadlines cover it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
from collections.abc import Sequence
from typing import ClassVar

import posix_ipc

from pipeline.errors import PlanError
from pipeline.messages.message import Message
from workers.channels.errors import ChannelTimeout
from workers.channels.interface import ChannelKind, End, Receiver, Sender
from workers.channels.shm.host_memory import check_shared_memory, new_prefix, too_little
from workers.channels.slot import Slot, slot_stride
from workers.channels.spec import ChannelSpec, Opening
from workers.channels.wakeup import acquire_within, create_semaphore, open_semaphore, unlink_semaphore

__all__ = ["SHM", "ShmReceiver", "ShmSender", "create_ring", "new_prefix", "ring_bytes", "unlink_ring"]

_HEADER_BYTES = 4096
_SIZES = struct.Struct("<qq")  # number of slots, bytes from one to the next
_NUM_SENT = struct.Struct("<q")  # written by the sender when it closes
_NUM_SENT_AT = 16
# Each flag has one writer, and the two sides do not share a cache line.
_SENDER_ATTACHED, _SENDER_CLOSED = 64, 65
_RECEIVER_ATTACHED, _RECEIVER_CLOSED = 128, 129
_CARD = 256  # from here to the end of the header a kind of channel leaves what its ends have to know of each other


def ring_bytes(slots: int, slot_bytes: int) -> int:
    """Bytes of shared memory a ring takes."""
    return _HEADER_BYTES + slots * slot_stride(slot_bytes)


def create_ring(name: str, slots: int, slot_bytes: int) -> None:
    """Make a ring and reserve its memory. It lives until `unlink_ring` and the last end that is attached.

    The name starts with the run's `new_prefix` and has up to 28 characters; ``slot_bytes`` are those of the largest
    encoded message, or header.

    Raises:
        PlanError: too little shared memory (unreserved, it would kill the process that touches it), or sizes below 1.
        FileExistsError: the name is taken.
    """
    if slots < 1 or slot_bytes < 1:
        raise PlanError(f"a channel needs at least 1 slot of 1 byte, not {slots} of {slot_bytes}.")
    total_bytes = ring_bytes(slots, slot_bytes)
    check_shared_memory(total_bytes)
    try:
        segment = posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX)
    except posix_ipc.ExistentialError as error:
        raise FileExistsError(f"shared memory ring '{name}' exists already") from error
    try:
        os.posix_fallocate(segment.fd, 0, total_bytes)
        os.pwrite(segment.fd, _SIZES.pack(slots, slot_stride(slot_bytes)), 0)
        create_semaphore(f"{name}-e", slots).close()
        create_semaphore(f"{name}-f", 0).close()  # last: who finds this one finds everything
    except BaseException as error:
        unlink_ring(name)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            check_shared_memory(total_bytes)
            raise too_little(total_bytes) from error
        raise
    finally:
        segment.close_fd()


def unlink_ring(name: str) -> None:
    """Remove a ring's names; ends that have attached go on, new ones cannot come. Twice is no error."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(f"/{name}")
    unlink_semaphore(f"{name}-e")
    unlink_semaphore(f"{name}-f")


class _ShmEnd(End):
    """One process's mapping of a ring, with the slots cut out once.

    Raises:
        ChannelTimeout: there is no such ring; this blocks for ``opening.within_s`` then.
        ValueError: somebody has attached this end before.
    """

    _attached_at: ClassVar[int]
    _closed_at: ClassVar[int]

    def __init__(self, channel: ChannelSpec, opening: Opening) -> None:
        super().__init__(channel, opening, (channel.edge.target, channel.edge.source)[self.side])
        name = channel.name
        try:
            self._filled = open_semaphore(f"{name}-f", opening.within_s)
            self._empty = open_semaphore(f"{name}-e", 0)
            segment = posix_ipc.SharedMemory(f"/{name}")
        except (TimeoutError, posix_ipc.ExistentialError) as error:
            raise ChannelTimeout(
                f"{self.label}: no shared memory ring '{name}' after {opening.within_s:.3g} s: was it made, and not yet"
                " unlinked?"
            ) from error
        try:
            populate = getattr(mmap, "MAP_POPULATE", 0)  # page faults now, not in the first messages
            mapping = mmap.mmap(segment.fd, segment.size, flags=mmap.MAP_SHARED | populate)
        finally:
            segment.close_fd()
        view = memoryview(mapping)
        self.capacity, stride = _SIZES.unpack_from(view)
        # Tensors read in place keep their slot's memoryview alive, and that the mapping: it is never closed
        # by hand (a tensor would crash), but goes with its last view.
        self._header, self._card = view[:_HEADER_BYTES], view[_CARD:_HEADER_BYTES]
        self._next = 0  # how many messages this side has sent or received
        self._closed, self._slots = False, list[Slot]()
        if self._header[self._attached_at]:
            raise ValueError(f"{self.label}: this end of '{name}' is attached already; a channel has one of each end")
        self._header[self._attached_at] = 1
        try:
            self._pin(view)
            memories = [view[start : start + stride] for start in range(_HEADER_BYTES, len(view), stride)]
            self._slots = self._slots_over(memories, channel, opening.within_s)
        except BaseException:
            self.close()
            raise

    def _slots_over(self, memories: Sequence[memoryview], channel: ChannelSpec, within_s: float) -> list[Slot]:
        return [self._slot(memory, channel) for memory in memories]

    def depth(self) -> int:
        return 0 if self._closed else max(0, self.capacity - int(self._empty.value))

    def close(self) -> None:
        """The sender gets `ChannelClosed` at once, the receiver behind what was sent."""
        if not self._closed:
            self._drain()
            self._header[self._closed_at] = 1
            (self._filled, self._empty)[self.side].release()  # wakes the peer; one more filled than messages sent
            self._closed, self._slots = True, []
            self._filled.close()
            self._empty.close()
            self._ring()


class ShmSender(_ShmEnd, Sender):
    """The sending end of a ring that any process makes with `create_ring`. Rings after each send."""

    _attached_at, _closed_at = _SENDER_ATTACHED, _SENDER_CLOSED

    def room(self) -> bool:
        return self._closed or bool(self._empty.value) or bool(self._header[_RECEIVER_CLOSED])

    def send(self, message: Message, deadline_s: float) -> None:
        if self._closed:
            self._refuse("the sender")
        if not acquire_within(self._empty, deadline_s):
            self._give_up(deadline_s)
        if self._header[_RECEIVER_CLOSED]:
            self._empty.release()
            self._refuse("the receiver")
        try:
            self._slots[self._next % self.capacity].write(self._stamped(message))
        except BaseException as error:
            self._empty.release()
            error.add_note(f"while sending on {self.label}")
            raise
        self._next += 1
        self._once_copied(self._post)

    def _post(self) -> None:
        self._filled.release()
        self._ring()

    def close(self) -> None:
        if not self._closed:
            _NUM_SENT.pack_into(self._header, _NUM_SENT_AT, self._next)
        super().close()


class ShmReceiver(_ShmEnd, Receiver):
    """The receiving end of a ring. Rings after each release."""

    _attached_at, _closed_at = _RECEIVER_ATTACHED, _RECEIVER_CLOSED
    _drained = False

    def poll(self) -> Message | None:
        # Asking for the value first makes an empty poll 0.1 us instead of 1 us.
        if not (self._closed or self._drained) and not self._filled.value:
            return None
        return self.receive(0)

    def receive(self, deadline_s: float) -> Message:
        if self._closed:
            self._refuse("the receiver")
        if self._drained:
            self._refuse("the sender")
        if not acquire_within(self._filled, deadline_s):
            self._give_up(deadline_s)
        if self._header[_SENDER_CLOSED] and self._next == _NUM_SENT.unpack_from(self._header, _NUM_SENT_AT)[0]:
            self._drained = True
            self._refuse("the sender")
        slot = self._slots[self._next % self.capacity]
        self._next += 1
        self.held += 1
        return self._checked(slot.read())

    def _free(self) -> None:
        if not self._closed:
            self._empty.release()
            self._ring()


SHM = ChannelKind("shm", ShmSender, ShmReceiver, lambda channel: channel.slot_bytes)
"""Between workers of one host: the cheapest way there is."""
