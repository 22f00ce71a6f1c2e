"""Work that takes the time it was given, a channel end that holds messages back: ``--emulate`` and ``--link``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from pipeline.messages.message import Message
from pipeline.plan.emulation import Link
from workers.channels.interface import Receiver
from workers.clock import now_ns

__all__ = ["DelayedReceiver", "Sleeper"]


class Sleeper:
    """Makes blocks last, by sleeping at their end."""

    def __init__(self) -> None:
        self._owed_ns = 0

    @contextlib.contextmanager
    def lasting(self, milliseconds: float) -> Iterator[None]:
        """A block that lasts that long. What the system overslept is taken off the next, so that the sum is right."""
        begin, length_ns = now_ns(), round(milliseconds * 1e6) - self._owed_ns
        yield
        left_ns = length_ns - (now_ns() - begin)
        if left_ns > 0:
            time.sleep(left_ns * 1e-9)
        self._owed_ns = now_ns() - begin - length_ns


class DelayedReceiver:
    """Holds each message of a receiver back, in its slot, until it would have arrived over a link."""

    def __init__(self, receiver: Receiver, link: Link) -> None:
        self._receiver, self._link = receiver, link
        self._waiting: Message | None = None
        self._free_ns = 0
        self.due_ns: int | None = None

    def poll(self) -> Message | None:
        """The next message in place, if it has arrived; ``due_ns`` says when the next one will, if that is known."""
        if self._waiting is None:
            self._waiting = self._receiver.poll()
            if self._waiting is None:
                self.due_ns = None
                return None
            num_bytes = sum(tensor.nbytes for tensor in self._waiting.tensors)
            self.due_ns, self._free_ns = self._link.arrival_ns(self._waiting.sent_ns, self._free_ns, num_bytes)
        if self.due_ns is not None and now_ns() < self.due_ns:
            return None
        message, self._waiting, self.due_ns = self._waiting, None, None
        return message
