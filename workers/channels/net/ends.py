"""The ends of a channel between two processes that share no memory; the protocol stands in `credit_end`."""

from __future__ import annotations

import contextlib

from pipeline.messages.message import Message
from workers.channels.interface import ChannelKind, Receiver, Sender
from workers.channels.net.credit_end import RemoteEnd
from workers.channels.net.gloo import PairBroken

__all__ = ["GLOO", "RemoteReceiver", "RemoteSender"]

_CLOSED = -1  # a credit that says: this receiver takes nothing any more


class RemoteSender(Sender, RemoteEnd):
    """The sending end of a remote channel."""

    _num_sent = _num_shipped = _num_released = 0

    def depth(self) -> int:
        return 0 if self._closed else self._num_sent - self._num_released

    def room(self) -> bool:
        """True, too, once the connection broke: a send then raises."""
        return self._has_room() or self._closed or self._peer_ended or self._broken is not None

    def send(self, message: Message, deadline_s: float) -> None:
        """As `Sender.send`; raises ``ChannelBroken`` once the connection is gone."""
        if self._closed:
            self._refuse("the sender")
        with self._changed:
            self._within(deadline_s, self._has_room)
            if self._peer_ended:
                self._refuse("the receiver")
            if self._broken is not None:
                self._break(0.0)
            index = self._num_sent % self._ring_size
            try:
                self._slots[index].write(self._stamped(message))
            except BaseException as error:
                error.add_note(f"while sending on {self.label}")
                raise
            self._num_sent += 1
            self._once_copied(self._ship_next)
            if self._broken is not None:
                self._break(0.0)

    def _ship_next(self) -> None:
        """The oldest message that is filled; in the thread that sent it, or in that of the staging."""
        with self._changed:
            if self._said_end or self._broken is not None:
                return  # nobody takes it
            try:
                self._ship_slot(self._num_shipped % self._ring_size)
            except PairBroken as error:
                self._broken = error
                self._changed.notify_all()
            self._num_shipped += 1

    def _ship_slot(self, index: int) -> None:
        self._ship(index, self._slot_bytes[index][: self._slots[index].used_bytes])

    def _has_room(self) -> bool:
        return self._num_sent - self._num_released < self.capacity

    def _arrived(self, index: int) -> bool:
        released = int(self._credits[index])
        if released == _CLOSED:
            return False
        if not self._said_end:
            self._expect(index)  # first, so that there is always one for every credit that can come
        self._num_released = released
        return True

    def _ship_end(self) -> None:
        index = self._num_shipped % self._ring_size
        self._slots[index].write_end()
        self._ship_slot(index)


class RemoteReceiver(Receiver, RemoteEnd):
    """The receiving end of a remote channel."""

    _num_arrived = _num_read = _num_released = _num_told = _num_credits = 0

    def depth(self) -> int:
        """Number of slots in use, as far as messages have arrived."""
        return 0 if self._closed else self._num_arrived - self._num_released

    def poll(self) -> Message | None:
        """As `Receiver.poll`; raises ``ChannelBroken`` once the connection is gone and what arrived was received."""
        if self._has_message() or self._closed or self._peer_ended or self._broken is not None:
            return self.receive(0)
        return None

    def receive(self, deadline_s: float) -> Message:
        if self._closed:
            self._refuse("the receiver")
        with self._changed:
            self._within(deadline_s, self._has_message)
            if not self._has_message():
                self._refuse("the sender")
            slot = self._slots[self._num_read % self._ring_size]
            self._num_read += 1
            self.held += 1
            return self._checked(slot.read())

    def _free(self) -> None:
        with self._changed:
            index = self._num_released % self._ring_size
            self._num_released += 1
            if not self._said_end and self._broken is None:
                with contextlib.suppress(PairBroken):  # the waiter sees it too
                    self._expect(index)
                    self._give_credit(self.capacity // 2 or 1)

    def _give_credit(self, least: int) -> None:
        """Tell the sender what was released, once ``least`` slots are in use as far as it knows."""
        if self._num_released > self._num_told and self._num_arrived - self._num_told >= least:
            self._num_told = self._num_released
            self._ship_credit(self._num_told)

    def _ship_credit(self, value: int) -> None:
        index = self._num_credits % self._ring_size
        self._num_credits += 1
        self._credits[index].fill_(value)
        self._ship(index, self._credits[index])

    def _has_message(self) -> bool:
        return self._num_arrived > self._num_read

    def _arrived(self, index: int) -> bool:
        if self._slots[index].is_end:
            return False
        self._num_arrived += 1
        if not self._said_end:
            self._give_credit(self.capacity)  # the sender believes that the channel is full
        return True

    def _ship_end(self) -> None:
        self._ship_credit(_CLOSED)


GLOO = ChannelKind("gloo", RemoteSender, RemoteReceiver)
"""Between workers of two hosts."""
