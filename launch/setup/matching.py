"""What the workers of a run have built, held against what this process has.

Workers make the recipe for themselves, on whatever host they are. What they begin with comes with their ``Ready``; the
training begins once all of these are there, so nothing was trained when this refuses.
"""

from __future__ import annotations

from pipeline import PlanError
from pipeline.plan.replica_layout import called, worker_of
from pipeline.run.resolved import Resolved
from pipeline.run.sketch import differences
from workers.telemetry.records import Ready

__all__ = ["Matching"]

_SHOWN = 4
_CAUSES = (
    "every worker calls model(), batches and loss for itself, and they have to give it the same. Usual causes: a value "
    "that the program has set in an imported module (hand it over, as functools.partial(model, hidden=64) does); "
    "random numbers that do not follow from the seed, as of os.urandom, uuid or the time (draw from torch, numpy or "
    "random, which are seeded); files that differ or change; memory that nobody filled (torch.empty)."
)


class Matching:
    """Compares what the workers of one run have built with what this process has, which is in ``resolved``."""

    def __init__(self, resolved: Resolved) -> None:
        self._resolved = resolved
        self._problems: dict[int, str] = {}
        self._seen: set[int] = set()

    def take(self, ready: Ready) -> None:
        """Take in what one worker says; once all have, raise PlanError if what some have built differs."""
        worker = worker_of(self._resolved.plan, ready.replica, ready.stage)
        self._seen.add(worker)
        expected = dict(self._resolved.fingerprints[ready.stage])
        if ready.replica:
            expected = {name: sketch for name, sketch in expected.items() if "held-out" not in name}
        if ready.built and (found := list(differences(expected, ready.built))):
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            who = called(self._resolved.plan, ready.replica, ready.stage)
            where = f"pid {ready.pid} on {self._resolved.hosts[worker]}"
            self._problems[worker] = f"{who} ({where}): {'; '.join(found[:_SHOWN])}{more}"
        if self._problems and len(self._seen) == self._resolved.plan.workers:
            told = [self._problems[worker] for worker in sorted(self._problems)][:_SHOWN]
            raise PlanError("\n  ".join(["what workers build is not what this process builds:", *told, _CAUSES]))
