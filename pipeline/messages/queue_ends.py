"""What a runner asks of the ends of a queue, whatever the queue is made of."""

from __future__ import annotations

from typing import Protocol

from pipeline.messages.message import Message

__all__ = ["Inlet", "Outlet"]


class Inlet(Protocol):
    """The receiving end of a queue. ``take`` never blocks; the message it gives owns its memory."""

    def take(self) -> Message | None:
        """The oldest message, or None."""


class Outlet(Protocol):
    """The sending end of a queue."""

    def room(self) -> bool:
        """Whether ``put`` would not block."""

    def put(self, message: Message) -> None:
        """Send; called only when there is room."""
