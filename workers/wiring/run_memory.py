"""Everything in shared memory that belongs to one run: made together, and unnamed as soon as all have attached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from pipeline.run.resolved import Resolved
from workers.channels.names import Names
from workers.channels.shm.host_memory import check_shared_memory, sweep_stale
from workers.channels.shm.ring import create_ring, ring_bytes, unlink_ring
from workers.channels.wakeup import WakeUp, unlink_semaphore
from workers.telemetry.status_table import StatusTable
from workers.wiring.edges import ChannelSpec, channels_of, ring_slot_bytes

__all__ = ["needed_bytes", "rings", "shared_memory", "unlink_all"]


def needed_bytes(resolved: Resolved, here: Collection[int] | None = None) -> int:
    """Bytes of shared memory the channels of a run take on the host of the workers ``here``; None: all on one host."""
    return _bytes_of(_channels(resolved, Names(""), here))


@contextmanager
def rings(channels: Sequence[ChannelSpec]) -> Iterator[Callable[[], None]]:
    """Make the rings of the channels, or raise PlanError; gives what removes their names, as the end does."""
    sweep_stale()
    check_shared_memory(_bytes_of(channels))
    try:
        for channel in channels:
            if (size := ring_slot_bytes(channel)) is not None:
                create_ring(channel.name, channel.slots, size)
        yield partial(_unlink_rings, channels)
    finally:
        _unlink_rings(channels)


@contextmanager
def shared_memory(resolved: Resolved, names: Names, here: Collection[int] | None = None) -> Iterator[StatusTable]:
    """Make the channels, the bells and the board of a run; remove their names at the end, whatever happens.

    ``here`` are the workers on this host; None: all. Raises PlanError where there is too little shared memory.
    """
    try:
        with rings(_channels(resolved, names, here)):
            for worker in range(resolved.plan.workers):
                WakeUp.create(names.bell(worker)).close()
            with StatusTable(names.board, resolved.plan.workers, create=True) as board:
                yield board
    finally:
        unlink_all(resolved, names)


def unlink_all(resolved: Resolved, names: Names) -> None:
    """Remove all names; whoever has attached goes on. Names already removed are no error."""
    _unlink_rings(_channels(resolved, names))
    for worker in range(resolved.plan.workers):
        unlink_semaphore(names.bell(worker))
    StatusTable.unlink_name(names.board)


def _unlink_rings(channels: Sequence[ChannelSpec]) -> None:
    for channel in channels:
        unlink_ring(channel.name)


def _channels(resolved: Resolved, names: Names, here: Collection[int] | None = None) -> list[ChannelSpec]:
    """The channels whose senders are here; both ends of a ring are on one host."""
    return [channel for channel in channels_of(resolved, names) if here is None or channel.edge.source in here]


def _bytes_of(channels: Sequence[ChannelSpec]) -> int:
    sizes = [(channel.slots, ring_slot_bytes(channel)) for channel in channels]
    return sum(ring_bytes(slots, size) for slots, size in sizes if size is not None)
