"""Time and queues of the reference driver: a clock that jumps from event to event, messages on their way."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from pipeline.messages.message import Message, dense
from pipeline.plan.channel_choice import narrowed, widened

__all__ = ["VirtualClock", "VirtualQueue", "VirtualSource"]


@dataclass
class VirtualClock:
    """Virtual time in ticks."""

    now: int = 0
    effect: int = 0  # when what is being done will be done
    _alarms: list[int] = field(default_factory=list)  # ticks at which something happens, a heap

    def at(self, tick: int) -> None:
        """Something happens then."""
        heapq.heappush(self._alarms, tick)

    def advance(self) -> bool:
        """Go to the next tick at which something happens. Whether there is one."""
        while self._alarms:
            if (tick := heapq.heappop(self._alarms)) > self.now:
                self.now = tick
                return True
        return False


@dataclass
class VirtualQueue:
    """A queue in virtual time: what is put at the end of an action arrives a hop, and ``late(batch)`` ticks, later."""

    clock: VirtualClock
    capacity: int
    hop: int
    wire_dtype: torch.dtype | None
    late: Callable[[int], int] = lambda batch: 0
    items: deque[tuple[int, Message]] = field(default_factory=deque)

    def room(self) -> bool:
        """What is on its way counts."""
        return len(self.items) < self.capacity

    def put(self, message: Message) -> None:
        """Send a copy, which overtakes none."""
        sent = narrowed(message, self.wire_dtype)
        message = message if sent is message else widened(sent)
        arrival = self.clock.effect + self.hop + self.late(message.batch)
        arrival = max(arrival, self.items[-1][0] if self.items else 0)
        self.items.append((arrival, message.holding(map(dense, message.tensors))))
        self.clock.at(arrival)

    def take(self) -> Message | None:
        return self.items.popleft()[1] if self.items and self.items[0][0] <= self.clock.now else None


@dataclass
class VirtualSource:
    """The data as an inlet."""

    messages: Iterator[Message]

    def take(self) -> Message | None:
        return next(self.messages, None)
