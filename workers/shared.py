"""Everything in shared memory that belongs to one run: made together, and unnamed as soon as all have attached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.resolve import Resolved
from workers.assignment import Names
from workers.bell import Bell, unlink_semaphore
from workers.board import Board
from workers.edges import Edge, edges_of
from workers.shm import check_shared_memory, create_ring, ring_bytes, sweep_stale, unlink_ring

__all__ = ["needed_bytes", "shared_memory", "unlink_all"]


def needed_bytes(resolved: Resolved) -> int:
    """Bytes of shared memory the channels of a run take; 0 where others carry them all."""
    return sum(ring_bytes(edge.slots, edge.slot_bytes) for edge in _rings(resolved, Names("")))


@contextmanager
def shared_memory(resolved: Resolved, names: Names) -> Iterator[Board]:
    """Make the channels, the bells and the board of a run; remove their names at the end, whatever happens.

    Raises:
        PlanError: too little shared memory.
    """
    sweep_stale()
    check_shared_memory(needed_bytes(resolved))
    try:
        for edge in _rings(resolved, names):
            create_ring(edge.name, edge.slots, edge.slot_bytes)
        for stage in range(resolved.plan.stages):
            Bell.create(names.bell(stage)).close()
        with Board(names.board, resolved.plan.stages, create=True) as board:
            yield board
    finally:
        unlink_all(resolved, names)


def unlink_all(resolved: Resolved, names: Names) -> None:
    """Remove all names; whoever has attached goes on. Names already removed are no error."""
    for edge in _rings(resolved, names):
        unlink_ring(edge.name)
    for stage in range(resolved.plan.stages):
        unlink_semaphore(names.bell(stage))
    Board.unlink_name(names.board)


def _rings(resolved: Resolved, names: Names) -> Iterator[Edge]:
    return (edge for edge in edges_of(resolved, names) if edge.kind == "shm")
