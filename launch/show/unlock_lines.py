"""When the stages of a run locked and unlocked (``pipeline.stage.unlock``), in words."""

from __future__ import annotations

from collections.abc import Iterator

from launch.results.result import Result
from workers.telemetry.records import Switched

__all__ = ["switch_line", "switch_summary"]


def switch_line(record: Switched) -> str:
    """``stage 1 unlocked at batch 240 (cosine 0.62, norm ratio 0.41)``."""
    where = f"stage {record.stage}" if record.replica == 0 else f"replica {record.replica}, stage {record.stage}"
    text = f"{where} {'locked again' if record.locked else 'unlocked'} at batch {record.batch:,}"
    if record.cosine is None or record.norm_ratio is None:
        return f"{text} (the warm-up is over)"
    return f"{text} (cosine {record.cosine:.2f}, norm ratio {record.norm_ratio:.2g})"


def switch_summary(result: Result) -> Iterator[str]:
    """A line per stage of replica 0 that has a DNI; nothing for a run that is unlocked from its first batch on."""
    plan = result.resolved.plan
    if not plan.warmup_steps and plan.unlock == "always":
        return
    for stage in range(plan.stages - 1):
        mine = sorted(s.batch for s in result.switches if (s.stage, s.replica) == (stage, 0))
        edges = [*mine, result.steps]  # it begins locked: unlocked from every second switch on
        unlocked = sum(max(0, end - begin) for begin, end in zip(edges[::2], edges[1::2], strict=False))
        share = unlocked / result.steps if result.steps else 0.0
        times = f"{len(mine)} switch{'' if len(mine) == 1 else 'es'}"
        yield f"stage {stage}: unlocked for {share:.0%} of the batches, {times}"
