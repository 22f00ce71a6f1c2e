"""Whether a run still moves: the whole of it, and every replica of the pipeline by itself.

A replica may stand still because it waits for the others, at its end for as long as they need. One that waits for
nobody else and stands still is stuck, however busily the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from pipeline.metrics.spans import Span
from pipeline.plan.plan import Plan
from workers.telemetry.status_table import Status

__all__ = ["Progress"]


class Progress:
    """Looks again and again at what every worker does (``read``); nothing may happen for ``patience_s``."""

    def __init__(self, read: Callable[[int], Status], plan: Plan, patience_s: float) -> None:
        self._read, self._patience_s = read, patience_s
        self._replicas = [range(r * plan.stages, (r + 1) * plan.stages) for r in range(plan.replicas)]
        self._seen = [self._count(workers) for workers in self._replicas]
        self._since = [time.monotonic()] * plan.replicas

    def stalled(self, heard: Collection[int], awaited: Collection[int]) -> bool:
        """Whether nothing happened for too long, in the whole run or in a replica that waits for no other.

        ``heard`` are the workers that have spoken since the last look, ``awaited`` those that are not done.
        """
        now = time.monotonic()
        for index, workers in enumerate(self._replicas):
            count = self._count(workers)
            if count != self._seen[index] or any(worker in heard for worker in workers):
                self._seen[index], self._since[index] = count, now
        if now - max(self._since) > self._patience_s:
            return True
        return any(
            now - since > self._patience_s
            and any(worker in awaited for worker in workers)
            and not any(self._read(worker).span is Span.HELD for worker in workers)
            for workers, since in zip(self._replicas, self._since, strict=True)
        )

    def _count(self, workers: range) -> int:
        return sum(self._read(worker).progress for worker in workers)
