"""Everything in shared memory that belongs to one run: made together, and unnamed as soon as all have attached."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from pipeline.run.resolved import Resolved
from workers.channels.names import Names
from workers.channels.shm.ring import check_shared_memory, create_ring, ring_bytes, sweep_stale, unlink_ring
from workers.channels.wakeup import WakeUp, unlink_semaphore
from workers.telemetry.status_table import StatusTable
from workers.wiring.edges import ChannelSpec, channels_of

__all__ = ["needed_bytes", "shared_memory", "unlink_all"]


def needed_bytes(resolved: Resolved, here: Collection[int] | None = None) -> int:
    """Bytes of shared memory the channels of a run take; 0 where others carry them all.

    Args:
        resolved: the run.
        here: the workers on the host in question; None: all.
    """
    return sum(ring_bytes(channel.slots, size) for channel, size in _rings(resolved, Names(""), here))


@contextmanager
def shared_memory(resolved: Resolved, names: Names, here: Collection[int] | None = None) -> Iterator[StatusTable]:
    """Make the channels, the bells and the board of a run; remove their names at the end, whatever happens.

    Args:
        resolved: the run.
        names: of what is made.
        here: the workers on this host; None: all.

    Raises:
        PlanError: too little shared memory.
    """
    sweep_stale()
    check_shared_memory(needed_bytes(resolved, here))
    try:
        for channel, size in _rings(resolved, names, here):
            create_ring(channel.name, channel.slots, size)
        for worker in range(resolved.plan.workers):
            WakeUp.create(names.bell(worker)).close()
        with StatusTable(names.board, resolved.plan.workers, create=True) as board:
            yield board
    finally:
        unlink_all(resolved, names)


def unlink_all(resolved: Resolved, names: Names) -> None:
    """Remove all names; whoever has attached goes on. Names already removed are no error."""
    for channel, _ in _rings(resolved, names):
        unlink_ring(channel.name)
    for worker in range(resolved.plan.workers):
        unlink_semaphore(names.bell(worker))
    StatusTable.unlink_name(names.board)


def _rings(resolved: Resolved, names: Names, here: Collection[int] | None = None) -> Iterator[tuple[ChannelSpec, int]]:
    """The channels with a ring in shared memory, and bytes of its slots. Both ends are on one host: one tells where."""
    for channel in channels_of(resolved, names):
        size = channel.ring_slot_bytes
        if size is not None and (here is None or channel.edge.source in here):
            yield channel, size
