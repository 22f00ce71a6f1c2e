"""Two processes and the bytes between them, over torch.distributed with gloo. The only file here that knows gloo.

    process A   TCPStore (Rendezvous)   process B        they meet by a name in the store;
        |<------- one TCP connection ------->|           from then on the store is not needed

What gloo really does, seen with torch 2.13, and what follows from it:

* A send completes when the other side has posted its receive: receives are posted ahead.
* ``is_completed()`` stays False until ``wait()`` has returned: somebody has to wait, in a thread of its own.
* A short message may arrive in a longer buffer; a long one in a shorter buffer ends the process.
* A ``wait`` that times out closes all connections of its group: deadlines are kept elsewhere, and ``cut`` uses it.
* The groups are made directly, not by ``new_group``: no process-wide state, and nobody else has to take part.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from workers.channels.errors import ChannelTimeout
from workers.channels.names import Meeting

__all__ = ["INTERFACE", "Meeting", "Pair", "PairBroken", "Rendezvous", "address_towards"]

INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable, known from torch: the network interface to use."""
_FOREVER = timedelta(days=365)
_AT_ONCE = timedelta(milliseconds=1)


class PairBroken(ConnectionError):
    """The connection of a pair is gone: the other process died, or this side cut it."""


def address_towards(host: str, port: int) -> str:
    """This host's address on the way to another host (``OSError``: there is none); nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


@dataclass(frozen=True)
class Rendezvous:
    """Where processes find each other: a TCPStore that one of them hosts, at ``host`` as the others reach it."""

    host: str
    port: int

    @classmethod
    @contextlib.contextmanager
    def hosted(cls, host: str = "127.0.0.1") -> Iterator[Self]:
        """Host the store in this process, on a free port of ``host``'s address only, until the block is left."""
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, 0), family=family, backlog=1024) as listening:
            port = listening.getsockname()[1]
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        yield cls(host, port)
        del store  # its server ends with it

    def join(self, within_s: float) -> Meeting:
        """Connect to the store; ``ChannelTimeout``: nothing answered within ``within_s`` seconds.

        The process's pairs then listen at the (first) interface that ``GLOO_SOCKET_IFNAME`` names, or else at its
        address as seen from the store's host.
        """
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=within_s)
            )
            interface = os.environ.get(INTERFACE, "").partition(",")[0]
            where = {"interface": interface} if interface else {"hostname": address_towards(self.host, self.port)}
            return Meeting(store, dist.ProcessGroupGloo.create_device(**where))
        except RuntimeError as error:  # torch's own errors and gloo's are RuntimeErrors
            raise ChannelTimeout(
                f"no store answered at {self.host}:{self.port} within {within_s:.3g} s ({_first_line(error)}): is the "
                "process that hosts it alive, and its port reachable from here?"
            ) from error


class Pair:
    """Bytes between two processes: in order in each direction, both directions at once. Use `join`.

    Every buffer given to `send` or `expect` must live, untouched, until the `wait` for it returned.
    """

    def __init__(self, group: Any, peer: int) -> None:
        self._group, self._peer = group, peer

    @classmethod
    def join(cls, meeting: Meeting, name: str, side: int, within_s: float) -> Self:
        """Connect to who joins the other side (0 or 1) of a name used once; ``ChannelTimeout``: nobody in that time."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [meeting.device]
        options._threads = 1
        options._timeout = timedelta(seconds=within_s)
        try:
            store = dist.PrefixStore(name, meeting.store)  # type: ignore[attr-defined]
            group = dist.ProcessGroupGloo(store, side, 2, options)
        except RuntimeError as error:
            raise ChannelTimeout(
                f"'{name}': the other side did not come within {within_s:.3g} s ({_first_line(error)})"
            ) from error
        return cls(group, 1 - side)

    def send(self, data: Tensor) -> Any:
        """Send a contiguous CPU tensor; returns what `wait` takes. Raises ``PairBroken``; does not block."""
        return _asked(self._group.send, [data], self._peer, 0)

    def expect(self, data: Tensor) -> Any:
        """Receive the next message into a tensor at least as long; else as `send`."""
        return _asked(self._group.recv, [data], self._peer, 0)

    def wait(self, work: Any, within: timedelta = _FOREVER) -> None:
        """Wait for a `send` or `expect`; ``PairBroken``: the connection is gone, or ``within`` over, which cuts it."""
        _asked(work.wait, within)

    def cut(self) -> None:
        """Close the connection; whoever waits, on either side, gets `PairBroken`."""
        with contextlib.suppress(PairBroken):
            self.wait(self.expect(torch.empty(1, dtype=torch.uint8)), _AT_ONCE)


def _asked(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except RuntimeError as error:
        raise PairBroken(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rpartition("] ")[2]
