"""Into how many microbatches to cut: a rival gets its best number, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from launch.bench.rivals.placement import check_microbatches, schedule_named
from launch.bench.rivals.ranks import HERE, Places
from launch.bench.rivals.torch_schedule import run_torch_schedule
from pipeline.data.recipe import Recipe
from pipeline.errors import PlanError
from pipeline.run.resolved import Resolved

__all__ = ["MicrobatchChoice", "best_microbatches"]

_CANDIDATES = (1, 2, 4, 8)


@dataclass(frozen=True)
class MicrobatchChoice:
    """The fastest number of microbatches.

    Attributes:
        microbatches: it.
        tried: samples per second of every number that was tried.
    """

    microbatches: int
    tried: dict[int, float]


def best_microbatches(
    source: Callable[[], Recipe],
    resolved: Resolved,
    schedule: str,
    *,
    threads: int,
    stages_per_rank: int | None = None,
    steps: int = 6,
    warmup: int = 2,
    rounds: int = 2,
    within_s: float = 3600.0,
    places: Places = HERE,
) -> MicrobatchChoice:
    """Try 1, 2, 4 and 8 microbatches, as far as batch and schedule allow, for a few steps each.

    Noise only ever adds time, so the fastest round counts for each.

    Args:
        source: makes the recipe.
        resolved: the run.
        schedule: one of ``SCHEDULES``.
        threads: compute threads of each rank.
        stages_per_rank: see ``run_torch_schedule``.
        steps: batches of each trial, with the warm-up.
        warmup: first batches of each trial that are not timed.
        rounds: how often each number is tried, in turns.
        within_s: how long one trial may take.
        places: where the ranks run.

    Raises:
        PlanError: no number fits, or the schedule cannot run.
        RunFailed: a trial failed.

    Blocks:
        for ``rounds`` short runs per number, a second or so each besides their steps.
    """
    short = replace(resolved, plan=replace(resolved.plan, steps=steps, evaluate_every=None, until=None))
    tried: dict[int, float] = {}
    for count in _possible(schedule, resolved) * rounds:
        run = run_torch_schedule(
            source,
            short,
            schedule,
            microbatches=count,
            threads=threads,
            warmup=warmup,
            stages_per_rank=stages_per_rank,
            within_s=within_s,
            evaluates=False,
            places=places,
        )
        tried[count] = max(tried.get(count, 0.0), run.batches * resolved.batch_shape[0] / run.seconds)
    return MicrobatchChoice(max(tried, key=tried.__getitem__), tried)


def _possible(schedule: str, resolved: Resolved) -> list[int]:
    schedule_named(schedule)
    refusals, possible = [], []
    for count in _CANDIDATES:
        try:
            check_microbatches(schedule, resolved, count)
            possible.append(count)
        except PlanError as error:
            refusals.append(str(error))
    if not possible:
        raise PlanError(*refusals)
    return possible
