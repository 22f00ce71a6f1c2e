"""A comparison at several points of an axis: ``bench --over-stages 1 2 4 8``, ``bench --over-latency-ms 0 10 50 100``.

round 1: every row at 1 stage, at 2, at 4, at 8    round 2: the same    ...    the machine's drift hits all points alike
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Column, Table

from launch.bench.compare import chosen_rows, run_rounds
from launch.bench.global_batch import RecipeSource
from launch.bench.report import BenchRow, Report, show
from launch.bench.where_rows_run import LOCAL, Site
from launch.options.options import BenchOptions
from launch.show.console import Console
from launch.show.tables import print_table
from pipeline import Plan, PlanError
from pipeline.plan.emulation import Link
from pipeline.run.resolved import Resolved

__all__ = ["AXES", "ScalingAxis", "ScalingReport", "axis_of", "bench_over", "mode_name"]


@dataclass(frozen=True, kw_only=True)
class ScalingAxis:
    """What a comparison can run over.

    ``name`` is that of a point's value in bench.json, ``label`` stands in the picture, whose file is ``picture``,
    ``heading`` above a column, ``unit`` behind a number. A plan has the value ``of(plan)``; ``place`` gives it another.
    """

    name: str
    label: str
    heading: str
    unit: str
    picture: str
    of: Callable[[Plan], float]
    place: Callable[[Plan, float], Plan]

    @property
    def field(self) -> str:
        """The option, and the field of bench.json."""
        return f"over_{self.name}"


def _with_latency(plan: Plan, latency_ms: float) -> Plan:
    bandwidth = (plan.links or Link()).bandwidth_mbps
    limit = f",bandwidth_mbps={bandwidth:g}" if bandwidth else ""
    return replace(plan, link=f"latency_ms={latency_ms:g}{limit}")


_FILLS = 4  # batches per stage from which on filling and draining the pipeline hardly count

AXES = (
    ScalingAxis(
        name="stages",
        label="number of stages",
        heading="stages",
        unit="stages",
        picture="latency.png",
        of=lambda plan: plan.stages,
        place=lambda plan, value: replace(plan, stages=int(value)),
    ),
    ScalingAxis(
        name="latency_ms",
        label="latency of a hop, ms",
        heading="hop ms",
        unit="ms a hop",
        picture="link.png",
        of=lambda plan: (plan.links or Link()).latency_ms,
        place=_with_latency,
    ),
)
"""Everything a comparison can run over."""


@dataclass(kw_only=True)
class ScalingReport(Report):
    """A report at the plan's own point, and (value, report) of all points, in ascending order, its own among them."""

    axis: ScalingAxis
    points: tuple[tuple[float, Report], ...]

    def as_dict(self) -> dict[str, Any]:
        points = [
            {self.axis.name: value, "verdict": r.verdict, "rows": r.row_dicts(), "left_out": r.left_out}
            for value, r in self.points
        ]
        return {**super().as_dict(), self.axis.field: points}

    def finding(self) -> str:
        """What changes from the first point to the last, in a sentence or two."""
        (first, low), (last, high) = self.points[0], self.points[-1]
        text = f"From {first:g} to {last:g} {self.axis.unit}: "
        parts = []
        for name in (mode_name(row) for row in (high.unlocked, high.best_locked) if row):
            same = [row for report in (low, high) for row in report.rows if mode_name(row) == name]
            pair = [row.latency_s[0] * 1e3 for row in same if row.latency_s]
            if len(pair) == 2:
                parts.append(f"{name} {pair[0]:,.1f} to {pair[1]:,.1f} ms")
        text += f"update latency of stage 0, {'; '.join(parts)}." if parts else "no update latency was measured."
        gains = [
            f"{report.unlocked.speedup(report.best_locked).times()} {report.best_locked.name}"
            for report in (low, high)
            if report.unlocked and report.best_locked
        ]
        return f"{text} Throughput of unlocked: {' at first, '.join(gains)} at last." if len(gains) == 2 else text


def axis_of(options: BenchOptions) -> ScalingAxis | None:
    """The axis that was asked for, if any."""
    return next((axis for axis in AXES if getattr(options, axis.field)), None)


def mode_name(row: BenchRow) -> str:
    """The name of a row without its number of microbatches, which may differ from point to point."""
    return replace(row, contender=replace(row.contender, microbatches=None)).name


def bench_over(
    source: RecipeSource, plan: Plan, options: BenchOptions, command: list[str], console: Console, site: Site = LOCAL
) -> ScalingReport:
    """Compare at every point that ``options`` ask for and at the plan's own; print the plan's own point in full first.

    Raises:
        PlanError: a point cannot run; nothing was started.
        RunFailed: a run failed.
    """
    axis = axis_of(options)
    if axis is None:
        raise PlanError(f"nothing to compare over: give one of {', '.join(each.field for each in AXES)}.")
    own = axis.of(plan)
    plans = {value: axis.place(plan, value) for value in sorted({own, *getattr(options, axis.field)})}
    names = chosen_rows(options.rows, plans[own])
    resolved: dict[float, Resolved] = {}
    for value, each in plans.items():
        try:
            resolved[value] = site.resolve(source, each)
        except PlanError as error:
            raise PlanError(*(f"{axis.field} {value:g}: {problem}" for problem in error.problems)) from error
    places = [(run, f"{axis.name}-{value:g}", f", {value:g} {axis.unit}") for value, run in resolved.items()]
    reports = run_rounds(source, names, resolved[own], places, options, command, console, site)
    points = tuple(zip(resolved, reports, strict=True))
    main = dict(points)[own]
    sweep = ScalingReport(**{**vars(main), "folder": main.folder.parent}, axis=axis, points=points)
    show(sweep, console)
    console.rich.print(f"\n[bold]{sweep.finding()}[/bold]\n")
    print_table(console.rich, _table(sweep))
    if short := [run for run in resolved.values() if run.steps < _FILLS * run.plan.stages > _FILLS]:
        most = max(run.plan.stages for run in short)
        text = f"{short[0].steps} batches do not fill {most} stages for long: busy% is too low there"
        console.extra("note", text, f"--steps {_FILLS * most} or more")
    return sweep


def _table(sweep: ScalingReport) -> Table:
    """One line per point and row, the points apart."""
    names = (sweep.axis.heading, "samples/s", f"x {sweep.rows[0].name}", "update ms p50", "p99", "busy%")
    point, *figures = (Column(name, justify="right", no_wrap=True) for name in names)
    table = Table(point, Column("mode", no_wrap=True), *figures, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for value, report in sweep.points:
        for index, row in enumerate(report.rows):
            latencies = [f"{seconds * 1e3:,.2f}" for seconds in row.latency_s] if row.latency_s else ["-", "-"]
            first, rate, busy = "" if index else f"{value:g}", f"{row.rate:,.0f}", row.mean_percent("busy")
            table.add_row(first, row.name, rate, row.speedup(report.rows[0]).brief(), *latencies, busy)
        if value != sweep.points[-1][0]:
            table.add_row()
    return table
