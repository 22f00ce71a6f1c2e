"""The table of a sweep: a line per setting."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

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
        whole = axis.numbers is not None
        table.add_column(axis.name, justify="right" if whole else "left", no_wrap=whole, overflow="fold")
    until = any(f.setting.plan.until for f in findings)
    for name in (metric.heading, "", "+bp", "train", "cosine", "dni%", *(["batches"] if until else []), "s"):
        table.add_column(name, justify="right", no_wrap=True)
    before: tuple[str, ...] = ()
    for finding in findings:
        labels = finding.setting.labels
        same = next((i for i, pair in enumerate(zip(labels, before, strict=False)) if pair[0] != pair[1]), 0)
        shown = ["" if before and i < same else label for i, label in enumerate(labels)]
        table.add_row(*shown, *_cells(finding, metric, until))
        before = labels
    return table


def _cells(finding: Finding, metric: Metric, until: bool) -> Iterator[str]:
    outcomes, figures, lost = finding.outcomes.values(), finding.figures.values(), len(finding.diverged)
    if finding.mean is not None:
        yield metric.text(finding.mean)
    else:
        yield "diverged" if lost == len(outcomes) else f"{lost}/{len(outcomes)} div."
    yield f"{metric.text(min(figures))}-{metric.text(max(figures))}" if len(figures) > 1 else ""
    yield metric.text(statistics.fmean(finding.above.values()), "+") if finding.above else ""
    train = [outcome.train_loss for outcome in outcomes if outcome.train_loss is not None]
    yield f"{statistics.fmean(train):.4f}" if train else "-"
    yield f"{min(finding.cosines):.2f} {max(finding.cosines):.2f}" if finding.cosines else ""
    shares = [outcome.dni_share for outcome in outcomes if outcome.dni_share is not None]
    yield f"{100 * statistics.median(shares):.1f}" if shares else ""
    if until:  # how many batches it took to the goal, where every run got there
        reached = [outcome.reached for outcome in outcomes if outcome.reached is not None]
        all_of_them = len(reached) == len(outcomes)
        yield f"{statistics.fmean(reached):,.0f}" if all_of_them else f"{len(reached)}/{len(outcomes)}"
    yield f"{statistics.median(outcome.seconds for outcome in outcomes):.0f}"
