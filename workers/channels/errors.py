"""How a channel fails."""

from __future__ import annotations

__all__ = ["ChannelBroken", "ChannelClosed", "ChannelTimeout"]


class ChannelTimeout(TimeoutError):
    """A wait on a channel reached its deadline; nothing was sent or received, and it may be tried again."""


class ChannelClosed(ConnectionError):
    """One of the ends was closed; nothing will travel on this channel any more."""


class ChannelBroken(ConnectionError):
    """The connection to the other end is gone without a close: its process has died, or the network has."""
