"""``freewheel bench``: the same training in several ways, interleaved over rounds, and what the comparison says.

round 1: backprop, naive, unlocked    round 2: backprop, naive, unlocked    ...    ratios are taken within a round
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.bench.report import BenchRow, Report, bench_verdict, emulated_by, show
from launch.bench.rows import DEFAULT_ROWS, EMULATED_ROWS, ROWS
from launch.bench.time_to_goal import Race, break_even
from launch.bench.where_rows_run import LOCAL, Site
from launch.options.options import BenchOptions
from launch.results import run_folder
from launch.results.dni_quality import StageQuality
from launch.results.environment import environment
from launch.show.console import Console
from launch.training import run
from pipeline import Plan, PlanError, Recipe, nearest
from pipeline.run.resolved import Resolved

__all__ = ["Comparison", "chosen_rows", "prepare_rows", "run_bench"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows that are ready to run on the same work.

    Attributes:
        recipe: name of what is trained.
        resolved: the unlocked run.
        folder: where the runs go.
        rows: by name, without outcomes at first.
        left_out: rows that cannot run here, with the reason.
        site: where the rows run.
    """

    recipe: str
    resolved: Resolved
    folder: Path
    rows: dict[str, BenchRow]
    left_out: dict[str, str]
    site: Site

    def run_round(self, number: int, console: Console, what: str) -> None:
        """Run every row once; blocks until all are over.

        Raises:
            RunFailed: a run failed.
        """
        for name, row in self.rows.items():
            with console.rich.status(f"{what}: {row.name}"):
                row.outcomes.append(row.contender.train(self.folder, f"{name}-{number + 1}"))

    def report(self, command: list[str]) -> Report:
        """What the rounds so far say, at least one."""
        rows = list(self.rows.values())
        lines, goal = [row.line for row in rows], self.resolved.plan.goal
        race = Race(goal, self.resolved, lines) if goal is not None else None
        sentences = [bench_verdict(rows, self.resolved, race), break_even(lines), race.verdict() if race else ""]
        verdict = " ".join(sentence for sentence in sentences if sentence)
        where = {**environment(), "hosts": list(self.site.hosts) or None}
        return Report(self.recipe, self.resolved, self.folder, verdict, command, where, rows, self.left_out, race)


def run_bench(
    source: Callable[[], Recipe],
    plan: Plan,
    options: BenchOptions,
    command: list[str],
    console: Console,
    site: Site = LOCAL,
) -> Report:
    """Compare ways to train on equal work, and print the verdict first.

    Same model, initial weights, batches and optimizer in every row; the first tenth of the batches warms up.

    Raises:
        PlanError: the plan, or a row that was asked for by name, cannot run.
        RunFailed: a run failed.
    """
    names = chosen_rows(options.rows, plan)
    resolved = site.resolve(source, replace(plan, quality_every=None))
    site.agree(resolved)
    folder = run_folder.new_run_dir(options.runs, options.name or run_folder.default_name(source().name, "bench"))
    console.decided(source().name, resolved, folder)
    comparison = prepare_rows(names, source, resolved, folder, console, site, everything="all" in options.rows)
    for number in range(options.rounds):
        comparison.run_round(number, console, f"round {number + 1} of {options.rounds}")
    report = comparison.report(command)
    if options.quality and "unlocked" in names and not report.emulated and plan.stages > 1:
        with console.rich.status("unlocked once more, with samples of the true gradient"):
            report.quality = _quality(source, resolved, plan.quality_every, folder, site)
    show(report, console)
    return report


def _quality(
    source: Callable[[], Recipe], resolved: Resolved, every: int | None, folder: Path, site: Site
) -> list[StageQuality]:
    """Of the synthetic gradients of one more unlocked run, whose speed counts nowhere."""
    sampled = replace(resolved.plan, quality_every=every or max(1, resolved.steps // _SAMPLES))
    resolved, quiet = site.resolve(source, sampled), Console(quiet=True)
    return run(source, resolved, folder, "quality", quiet, launcher=site.launcher).quality


def chosen_rows(wanted: Sequence[str], plan: Plan) -> list[str]:
    """Names of the rows: the yardstick first. Emulated stages have nothing that others could run.

    Raises:
        PlanError: no such row, or one that cannot run with this plan; or the plan evaluates on the way.
    """
    if plan.evaluate_every is not None and plan.until is None:
        raise PlanError("a benchmark evaluates once, at the end of each run: leave --evaluate-every out, or add until.")
    for name in wanted:
        if name != "all" and name not in ROWS:
            raise PlanError(nearest(name, [*ROWS, "all"], "row"))
    if emulated_by(plan):
        theirs = [name for name in wanted if name not in (*EMULATED_ROWS, "all", *DEFAULT_ROWS)]
        if theirs:
            raise PlanError(f"{', '.join(theirs)} cannot be emulated: leave it out, or leave out what emulates.")
        return [name for name in EMULATED_ROWS if "all" in wanted or name in wanted]
    return [name for name in ROWS if name == "backprop" or "all" in wanted or name in wanted]


def prepare_rows(
    names: Sequence[str],
    source: Callable[[], Recipe],
    resolved: Resolved,
    folder: Path,
    console: Console,
    site: Site,
    *,
    everything: bool,
) -> Comparison:
    """Make rows ready: some find their number of microbatches first, in short runs that this blocks on.

    With ``everything``, rows that cannot run here are left out instead of refused.

    Raises:
        PlanError: a row cannot run here.
        RunFailed: a short run failed.
    """
    rows: dict[str, BenchRow] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            with console.rich.status(f"preparing {name}"):
                rows[name] = BenchRow(replace(ROWS[name](source, resolved, folder, site), launcher=site.name))
        except PlanError as error:
            if not everything:
                raise
            left_out[name] = str(error)
    recipe = source().name
    return Comparison(recipe=recipe, resolved=resolved, folder=folder, rows=rows, left_out=left_out, site=site)


_SAMPLES = 20
"""Batches of a run whose quality is sampled, where the user does not say."""
