"""How good the synthetic gradients of a run were, per stage: the medians of the sampled batches of its second half."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from workers.telemetry.records import Judged

__all__ = ["QUALITY_LEGEND", "StageQuality", "quality_table", "summarised"]

QUALITY_LEGEND = (
    "cosine, ratio: gradient of the stage's weights under the synthetic gradient against that under the true one\n"
    "error: |s - g|^2 / |g|^2 at the cut; 1 is no better than zeros"
)


@dataclass(frozen=True)
class StageQuality:
    """One stage: the medians of what ``QUALITY_LEGEND`` explains, over ``samples`` batches."""

    stage: int
    samples: int
    cosine: float
    norm_ratio: float
    error: float | None  # None: not finite, in the files of a sweep


def summarised(judged: Sequence[Judged], steps: int) -> list[StageQuality]:
    """One entry per stage that was sampled in the second half of a run of ``steps`` batches."""
    late = [record for record in judged if record.batch >= steps // 2]
    found = []
    for stage in sorted({record.stage for record in late}):
        mine = [record for record in late if record.stage == stage]
        figures = zip(*((each.cosine, each.norm_ratio, each.error) for each in mine), strict=True)
        found.append(StageQuality(stage, len(mine), *map(statistics.median, figures)))
    return found


def quality_table(qualities: Sequence[StageQuality]) -> Table:
    """The same for the terminal."""
    table = Table(title="quality of the synthetic gradients", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "samples", "cosine", "ratio", "error"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for each in qualities:
        figures = (f"{value:.3f}" for value in (each.cosine, each.norm_ratio, each.error))
        table.add_row(str(each.stage), str(each.samples), *figures)
    return table
