"""What a stage sends to the stage below. It never blocks the stage.

gradient somebody waits for   waits until there is room; as many as are awaited
target                        nobody waits: of those that find no room the newest is kept, the rest are dropped
sample, END                   few, and none is dropped
DROPPED                       tells the stage below that it need not keep anything for targets that do not come
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message
from pipeline.messages.queue_ends import Outlet
from pipeline.metrics.spans import Recorder, Span

__all__ = ["Uplink"]


@dataclass
class Uplink:
    """The way up of one stage, the sender."""

    stage: int
    outlet: Outlet | None  # None in the first stage, which sends nothing
    record: Recorder
    dropped: int = 0  # targets
    ended: bool = False  # the END has been sent, or there is nobody to send it to
    _unsent: list[Message] = field(default_factory=list)
    _target: Message | None = None

    def gradient(self, message: Message, *, awaited: bool) -> bool:
        """Send a gradient that the stage below waits for (``awaited``), or a target; whether one was dropped for it."""
        if self.outlet is None:
            return False
        drops = not awaited and self._target is not None
        if drops:
            self._unsent = [waiting for waiting in self._unsent if waiting is not self._target]
            self.dropped += 1
        self._target = self._target if awaited else message
        self.send(message)
        return drops

    def tell_dropped(self, oldest: int) -> None:
        """Tell that no target of a batch older than ``oldest`` follows; takes the place of an earlier one."""
        self._unsent = [waiting for waiting in self._unsent if waiting.kind is not Kind.DROPPED]
        self.send(Message(Kind.DROPPED, Item(oldest), self.stage))

    def send(self, message: Message) -> None:
        """Send, behind everything that waits."""
        if self.outlet is None:
            self.ended = message.kind is Kind.END
            return
        if message.payload:
            self.record(Span.SEND, message.batch)
        self._unsent.append(message)
        self.flush()

    def flush(self) -> None:
        """Send what finds room."""
        while self._unsent and self.outlet is not None and self.outlet.room():
            message = self._unsent.pop(0)
            self._target = None if message is self._target else self._target
            self.outlet.put(message)
            self.ended = message.kind is Kind.END
