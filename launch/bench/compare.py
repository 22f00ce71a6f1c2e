"""``freewheel bench``: the same training in several ways, interleaved over rounds, and what the comparison says.

round 1: backprop, naive, unlocked    round 2: backprop, naive, unlocked    ...    ratios are taken within a round
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.bench.global_batch import RecipeSource
from launch.bench.report import BenchRow, Report, emulated_by, show
from launch.bench.rows import DEFAULT_ROWS, EMULATED_ROWS, ROWS
from launch.bench.where_rows_run import LOCAL, Site
from launch.options.options import BenchOptions
from launch.results import run_folder
from launch.results.environment import environment
from launch.show.console import Console
from launch.training import run
from pipeline import Plan, PlanError, nearest
from pipeline.run.resolved import Resolved

__all__ = ["chosen_rows", "run_bench", "run_rounds"]


def run_bench(
    source: RecipeSource, plan: Plan, options: BenchOptions, command: list[str], console: Console, site: Site = LOCAL
) -> Report:
    """Compare ways to train with the same model, initial weights, batches and optimizer, and print the verdict first.

    Raises:
        PlanError: the plan, or a row that was asked for by name, cannot run.
        RunFailed: a run failed.
    """
    names = chosen_rows(options.rows, plan)
    resolved = site.resolve(source, replace(plan, quality_every=None))
    (report,) = run_rounds(source, names, resolved, [(resolved, "", "")], options, command, console, site)
    if options.quality and "unlocked" in names and not report.emulated and plan.stages > 1:
        every = plan.quality_every or max(1, resolved.steps // 20)
        with console.rich.status("unlocked once more, with samples of the true gradient"):
            sampled = site.resolve(source, replace(resolved.plan, quality_every=every))
            once = run(source, sampled, report.folder, "quality", Console(quiet=True), launcher=site.launcher)
        report.quality = once.quality
    show(report, console)
    return report


def run_rounds(
    source: RecipeSource,
    names: Sequence[str],
    own: Resolved,
    points: Sequence[tuple[Resolved, str, str]],
    options: BenchOptions,
    command: list[str],
    console: Console,
    site: Site,
) -> list[Report]:
    """Run the named rows of all points in all rounds, on which this blocks; a report for every point.

    Points are plans, each with where in the benchmark's folder its runs go, and what the console says of it.

    Raises:
        PlanError: a row cannot run here; but where all rows are asked for it is left out.
        RunFailed: a run failed.
    """
    site.agree(own)
    recipe = source().name
    folder = run_folder.new_run_dir(options.runs, options.name or run_folder.default_name(recipe, "bench"))
    console.decided(recipe, own, folder)
    where, reports = {**environment(), "hosts": list(site.hosts) or None}, []
    for resolved, place, _ in points:
        report = Report(recipe, resolved, folder / place, command, where, [], {})
        for name in names:
            try:
                with console.rich.status(f"preparing {name}"):
                    contender = replace(ROWS[name](source, resolved, report.folder, site), launcher=site.name)
                report.rows.append(BenchRow(contender, label=name))
            except PlanError as error:
                if "all" not in options.rows:
                    raise
                report.left_out[name] = str(error)
        reports.append(report)
    for number in range(1, options.rounds + 1):
        for (_, _, point), report in zip(points, reports, strict=True):
            for row in report.rows:
                with console.rich.status(f"round {number} of {options.rounds}{point}: {row.name}"):
                    row.outcomes.append(row.contender.train(report.folder, f"{row.label}-{number}"))
    return reports


def chosen_rows(wanted: Sequence[str], plan: Plan) -> list[str]:
    """Names of the rows, or PlanError: no such row, one that cannot run with this plan, or it evaluates on the way."""
    if plan.evaluate_every is not None and plan.until is None:
        raise PlanError("a benchmark evaluates once, at the end of each run: leave --evaluate-every out, or add until.")
    for name in wanted:
        if name != "all" and name not in ROWS:
            raise PlanError(nearest(name, [*ROWS, "all"], "row"))
    if emulated_by(plan):
        if theirs := [name for name in wanted if name not in (*EMULATED_ROWS, "all", *DEFAULT_ROWS)]:
            raise PlanError(f"{', '.join(theirs)} cannot be emulated: leave it out, or leave out what emulates.")
        return [name for name in EMULATED_ROWS if "all" in wanted or name in wanted]
    return [name for name in ROWS if name == "backprop" or "all" in wanted or name in wanted]
