"""What both ends of a channel between processes without common memory share: the protocol, and the thread that listens.

    sender                         pair                      receiver
    | slot 0 | slot 1 | ... |  -- messages -->   | slot 0 | slot 1 | ... |   receives are posted ahead for all slots
    released: n                <-- credits --    | n = messages released |   the sender has room while sent - n < slots

It is the shared memory ring, but each side has its own half. One slot more than the capacity is for the message that
says that nothing will follow, so that a close never waits for room. Either end may begin to close; the other answers at
once, from its waiter thread, so each knows that everything it sent has arrived before the connection goes.

Each end has one waiter thread: it takes what arrives and rings the bell of its own worker. Buffers need no bookkeeping:
a credit for message n proves that message n has left, message n that the credits up to n - slots have. A credit costs
as much as a small message, so it is given only where the sender takes half of the slots or more to be in use.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor

from workers.channels.errors import ChannelBroken, ChannelTimeout
from workers.channels.interface import End
from workers.channels.net.gloo import Meeting, Pair, PairBroken
from workers.channels.slot import Slot, slot_stride
from workers.channels.spec import ChannelSpec, Opening

__all__ = ["RemoteEnd"]

_CLOSE_WITHIN_S = 2.0


class RemoteEnd(End):
    """What both ends share: two rings of buffers, one per direction, and the thread that waits for what arrives.

    It rings its own worker, when a message or a release has arrived, and when the channel closes or breaks.

    Raises:
        ChannelTimeout: the other end did not come in ``opening.within_s`` to connect, or in as long again to greet.
        ValueError: the ends do not agree on the slots.
    """

    def __init__(self, channel: ChannelSpec, opening: Opening) -> None:
        super().__init__(channel, opening, (channel.edge.source, channel.edge.target)[self.side])
        assert opening.meeting is not None, "an edge over gloo needs a rendezvous"
        self._changed = threading.Condition()  # guards everything below, and who sends
        self._closed = self._said_end = self._peer_ended = False
        self._broken: PairBroken | None = None
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._listen, name=f"{self.label}, {self.who}", daemon=True)
        self._pair = Pair.join(opening.meeting, channel.meets_as, self.side, opening.within_s)
        try:
            self._connect(opening.meeting, channel, opening.within_s)
            self._make_slots(channel)
            self._greet(opening.within_s)
        except BaseException:
            self._cut()
            raise
        for index in range(self._ring_size):
            self._expect(index)
        self._thread.start()

    def _make_slots(self, channel: ChannelSpec) -> None:
        self._ring_size, stride = self.capacity + 1, slot_stride(self._header_bytes or channel.slot_bytes)
        pages = mmap.mmap(-1, self._ring_size * stride)  # zeros, and whole pages: a device may want to have them pinned
        memory = torch.frombuffer(pages, dtype=torch.uint8).view(self._ring_size, stride)
        self._pin(memoryview(pages))
        self._slots: Sequence[Slot] = [self._slot(memoryview(row.numpy()), channel) for row in memory]
        self._slot_bytes = list(memory)
        self._credits = list(torch.zeros(self._ring_size, 1, dtype=torch.int64))
        self._incoming = (self._credits, self._slot_bytes)[self.side]  # where what the peer says lands
        self._sent: list[Any] = [None] * self._ring_size
        self._expected: list[Any] = [None] * self._ring_size

    def close(self) -> None:
        """Blocks until what is under way to or from a device is copied, and the peer answered: within 2 s, or never."""
        if self._closed:
            return
        self._wind_up()
        if self._peer_ended:
            self._flush()
        self._cut()
        self._thread.join(_CLOSE_WITHIN_S)
        self._slots, self._sent, self._expected = [], [], []
        self._ring()

    @abstractmethod
    def _arrived(self, index: int) -> bool:
        """Take in what arrived in a buffer; False when it says that nothing will follow."""

    @abstractmethod
    def _ship_end(self) -> None:
        """Ship what says that nothing will follow."""

    def _connect(self, meeting: Meeting, channel: ChannelSpec, within_s: float) -> None:
        """Connect what else there is to be connected."""

    def _cut(self) -> None:
        self._pair.cut()

    def _greet(self, within_s: float) -> None:
        """Agree with the other end on the slots, which also warms the connection up."""
        mine = torch.tensor([self._ring_size, self._slot_bytes[0].numel()])
        theirs = torch.zeros_like(mine)
        try:
            for work in (self._pair.expect(theirs), self._pair.send(mine)):
                self._pair.wait(work, timedelta(seconds=within_s))
        except PairBroken as error:
            said = f"{self.label}: no greeting from the {self.peer} in {within_s:.3g} s: {error}"
            raise ChannelTimeout(said) from error
        if not torch.equal(mine, theirs):
            raise ValueError(
                f"{self.label}: the {self.who} has {mine[0] - 1} slots of {mine[1]} bytes, the {self.peer} "
                f"{theirs[0] - 1} of {theirs[1]}: both must run the same plan with the same version"
            )

    def _wind_up(self) -> None:
        """Copy what is under way to or from a device, then part."""
        self._drain()
        self._part()

    def _say_end(self) -> None:
        """Tell the peer, once, that nothing will follow. With the lock held."""
        if not self._said_end and self._broken is None:
            self._said_end = True
            with contextlib.suppress(PairBroken):  # the waiter sees it too
                self._ship_end()

    def _part(self) -> None:
        """Say that nothing will follow, and wait for the peer's answer, 2 s at most."""
        with self._changed:
            self._closed = True
            self._say_end()
            self._changed.wait_for(lambda: self._peer_ended or self._broken, _CLOSE_WITHIN_S)
            self._changed.notify_all()

    def _listen(self) -> None:
        """The waiter thread: until the peer has ended or the connection is gone."""
        try:
            for index in itertools.cycle(range(self._ring_size)):
                self._pair.wait(self._expected[index])
                if not self._take_in(index):
                    return
        except PairBroken as error:
            self._lose(error)

    def _take_in(self, index: int) -> bool:
        """What has arrived in a buffer, from the waiter thread; False when nothing follows it."""
        with self._changed:
            self._heard = time.monotonic()
            more = self._arrived(index)
            if not more:
                self._peer_ended = True
                self._say_end()
            self._changed.notify_all()
        self._ring()
        return more

    def _lose(self, error: PairBroken) -> None:
        """The connection is gone; the first reason counts."""
        with self._changed:
            self._broken = self._broken or error
            self._changed.notify_all()
        self._ring()

    def _expect(self, index: int) -> None:
        self._expected[index] = self._pair.expect(self._incoming[index])

    def _ship(self, index: int, data: Tensor) -> None:
        """Send a buffer; what was sent from it before has left, see above, but gloo wants to hear a wait for it."""
        if self._sent[index] is not None:
            self._pair.wait(self._sent[index])
        self._sent[index] = self._pair.send(data)

    def _flush(self) -> None:
        """Wait until the last words have left; the peer has posted its receives for them."""
        with contextlib.suppress(PairBroken):
            for work in filter(None, self._sent):
                self._pair.wait(work, timedelta(seconds=_CLOSE_WITHIN_S))

    def _within(self, deadline_s: float, ready: Callable[[], bool]) -> None:
        """Wait, with the lock held, until ``ready``, the peer's end or a broken connection; else give up."""
        start = time.monotonic()
        if not self._changed.wait_for(lambda: ready() or self._peer_ended or self._broken, deadline_s):
            self._give_up(deadline_s)
        if not (ready() or self._peer_ended):
            self._break(time.monotonic() - start)

    def _break(self, waited_s: float) -> NoReturn:
        raise ChannelBroken(
            f"{self.label}: the connection broke while the {self.who} waited for the {self.peer} ({waited_s:.3g} s, "
            f"{self._fullness()}, last heard of it {time.monotonic() - self._heard:.3g} s ago): {self._broken}. Its "
            "process died, or the network between the hosts did: look what its worker reported, and at its system's log"
        ) from self._broken
