"""Everything in shared memory that belongs to one run: made together, and unnamed as soon as all have attached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.resolve import Resolved
from workers.assignment import Names, slot_bytes
from workers.bell import Bell, unlink_semaphore
from workers.board import Board
from workers.shm import check_shared_memory, create_ring, ring_bytes, sweep_stale, unlink_ring

__all__ = ["needed_bytes", "shared_memory", "unlink_all"]


def _rings(resolved: Resolved, names: Names) -> Iterator[tuple[str, int, int]]:
    plan = resolved.plan
    for k, cut in enumerate(resolved.cuts):
        down, up = slot_bytes(cut)
        yield names.activations(k), plan.activation_slots, down
        yield names.gradients(k), plan.gradient_slots_at(k), up


def needed_bytes(resolved: Resolved) -> int:
    """Bytes of shared memory the channels of a run take."""
    return sum(ring_bytes(slots, size) for _, slots, size in _rings(resolved, Names("")))


@contextmanager
def shared_memory(resolved: Resolved, names: Names) -> Iterator[Board]:
    """Make the channels, the bells and the board of a run; remove their names at the end, whatever happens.

    Raises:
        PlanError: too little shared memory.
    """
    sweep_stale()
    check_shared_memory(needed_bytes(resolved))
    try:
        for name, slots, size in _rings(resolved, names):
            create_ring(name, slots, size)
        for stage in range(resolved.plan.stages):
            Bell.create(names.bell(stage)).close()
        with Board(names.board, resolved.plan.stages, create=True) as board:
            yield board
    finally:
        unlink_all(resolved, names)


def unlink_all(resolved: Resolved, names: Names) -> None:
    """Remove all names; whoever has attached goes on. Names already removed are no error."""
    for name, _, _ in _rings(resolved, names):
        unlink_ring(name)
    for stage in range(resolved.plan.stages):
        unlink_semaphore(names.bell(stage))
    Board.unlink_name(names.board)
