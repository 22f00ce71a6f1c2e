"""What an emulated run ought to reach: the policies on the reference driver's virtual clock, nothing computed."""

from __future__ import annotations

from dataclasses import replace

from pipeline.plan.plan import Plan
from pipeline.run.reference import ENDS, Costs, timeline

__all__ = ["predicted_batches_per_s"]

_TICKS_PER_MS = 1000


def predicted_batches_per_s(plan: Plan, warmup: int) -> float | None:
    """Steps per second of a replica of a resolved plan, between the last stage's update number ``warmup`` and its last.

    None where nothing is emulated, a stage takes no time, or a link's bandwidth is limited: the clock has none.
    """
    lengths, link = plan.emulation, plan.links
    if lengths is None or (link is not None and link.bandwidth_mbps) or plan.steps is None or plan.steps <= warmup:
        return None
    stage = lengths.stage_ms * _TICKS_PER_MS / plan.microbatches
    dni = lengths.dni_ms * _TICKS_PER_MS / 2 if plan.unlocked else 0.0
    costs = Costs(forward=round(stage / 3), backward=round(stage * 2 / 3 + dni), learn=round(dni))
    latency = link.latency_ms * _TICKS_PER_MS if link is not None else 0.0
    if not (step := costs.forward + costs.backward):
        return None
    events = timeline(replace(plan, hop_steps=latency / step), 0, costs)
    ends = [e.end for e in events if (e.replica, e.stage) == (0, plan.stages - 1) and e.action in ENDS]
    ends = ends[plan.microbatches - 1 :: plan.microbatches]
    ticks = ends[-1] - ends[warmup - 1]
    return (plan.steps - warmup) * 1000 * _TICKS_PER_MS / ticks if ticks else None
