"""The table of a sweep: a line per setting."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.table import Table

from launch.sweep.findings import METRICS, Finding, Metric
from launch.sweep.grid import Grid

__all__ = ["SWEEP_LEGEND", "table_of"]

SWEEP_LEGEND = (
    "mean over the seeds, smallest to largest; +bp: above backpropagation on the same work, seed by seed\n"
    "cosine: gradient of a stage's weights under the synthetic and the true gradient, worst and best cut\n"
    "dni%: operations of the DNIs over those of their stages; train: training loss of the last tenth"
)


def table_of(grid: Grid, findings: Sequence[Finding]) -> Table:
    """Figures per setting; a blank where a value is that of the line above."""
    metric = METRICS[grid.metric]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for axis in grid.axes:
        table.add_column(
            axis.name, justify="right" if axis.numbers else "left", no_wrap=bool(axis.numbers), overflow="fold"
        )
    until = any(f.setting.plan.until for f in findings)
    heading = [metric.heading, "", "+bp", "train", "cosine", "dni%", *(["batches"] if until else []), "s"]
    for name in heading:
        table.add_column(name, justify="right", no_wrap=True)
    before: tuple[str, ...] = ()
    for finding in findings:
        labels = finding.setting.labels
        same = next((i for i, pair in enumerate(zip(labels, before, strict=False)) if pair[0] != pair[1]), 0)
        shown = ["" if before and i < same else label for i, label in enumerate(labels)]
        table.add_row(*shown, *_cells(finding, metric), *([_batches(finding)] if until else []), _seconds(finding))
        before = labels
    return table


def _cells(finding: Finding, metric: Metric) -> list[str]:
    outcomes = finding.outcomes.values()
    train = [outcome.train_loss for outcome in outcomes if outcome.train_loss is not None]
    cosines, shares = finding.cosines, [o.dni_share for o in outcomes if o.dni_share is not None]
    return [
        _mean(finding, metric),
        _spread(finding.figures, metric),
        f"{statistics.fmean(finding.above.values()):+.{metric.decimals}f}" if finding.above else "",
        f"{statistics.fmean(train):.4f}" if train else "-",
        f"{min(cosines):.2f} {max(cosines):.2f}" if cosines else "",
        f"{100 * statistics.median(shares):.1f}" if shares else "",
    ]


def _mean(finding: Finding, metric: Metric) -> str:
    if lost := len(finding.diverged):
        return "diverged" if lost == len(finding.outcomes) else f"{lost}/{len(finding.outcomes)} div."
    assert finding.mean is not None
    return metric.text(finding.mean)


def _spread(figures: Mapping[int, float], metric: Metric) -> str:
    values = figures.values()
    return f"{metric.text(min(values))}-{metric.text(max(values))}" if len(values) > 1 else ""


def _batches(finding: Finding) -> str:
    """How many it took to the goal, where every run got there."""
    reached = [outcome.reached for outcome in finding.outcomes.values()]
    known = [each for each in reached if each is not None]
    return f"{statistics.fmean(known):,.0f}" if len(known) == len(reached) else f"{len(known)}/{len(reached)}"


def _seconds(finding: Finding) -> str:
    return f"{statistics.median(outcome.seconds for outcome in finding.outcomes.values()):.0f}"
