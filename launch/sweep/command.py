"""``freewheel sweep``: a grid of runs in the reference driver, remembered point by point; a table and a picture.

what will run  ->  the missing points, side by side  ->  table  ->  verdict, sweep.json, sweep.png  ->  what to try next
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from launch.options.options import Parsed, parse
from launch.plots import drawn
from launch.results.environment import environment
from launch.results.result import SCHEMA
from launch.show.console import Console, without
from launch.show.tables import print_table
from launch.sweep.axes import arguments_for
from launch.sweep.findings import METRICS, Finding, findings_json, findings_of, label_of, verdict_of
from launch.sweep.grid import Grid, Point, grid_of
from launch.sweep.options import SweepOptions, with_preset
from launch.sweep.points import Outcome, Store
from launch.sweep.table import SWEEP_LEGEND, table_of
from launch.sweep.work import Broken, run_points
from pipeline import PlanError
from workers.errors import RunFailed
from workers.files import write_json

__all__ = ["keep_aside", "sweep"]


def sweep(recipe: str, arguments: Sequence[str]) -> None:
    """Run what is missing of a grid and show all of it; blocks until every point is there.

    Raises:
        PlanError: something in the grid cannot run; nothing was started.
        RunFailed: a run broke; the others were finished first, and the next call runs it again.
        KeyboardInterrupt: what was finished by then is kept.
    """
    command = ["freewheel", "sweep", recipe, *arguments]
    arguments = with_preset(arguments)
    parsed = parse(recipe, arguments, SweepOptions, "freewheel sweep", writes=False)
    options: SweepOptions = parsed.run
    if problems := list(options.problems()):
        raise PlanError(*problems)
    grid = grid_of(recipe, arguments, parsed)
    # Named by the question, so that a second call finds what the first one left.
    varied = "-".join(axis.name for axis in grid.axes) or "seeds"
    folder = options.runs / (options.name or re.sub(r"[^\w.+=-]+", "-", f"{grid.title}-sweep-{varied}"))
    console, store = Console(quiet=options.quiet), Store(folder)
    outcomes = {key: found for key, point in grid.points.items() if (found := store.find(point)) is not None}
    missing = [point for key, point in grid.points.items() if key not in outcomes]
    _announce(grid, missing, store, options, console)
    broken = _run(grid, missing, outcomes, store, options, console)
    findings = findings_of(grid, outcomes)
    if not findings:
        raise _failed(broken)
    verdict = verdict_of(grid, findings)
    keep_aside(folder, command)
    content = {
        "schema": SCHEMA,
        "verdict": verdict,
        "command": command,
        "environment": environment(),
        "recipe": grid.title,
        "metric": grid.metric,
        "axes": [{"name": axis.name, "values": list(axis.labels)} for axis in grid.axes],
        "seeds": list(grid.seeds),
        "settings": findings_json(grid, findings),
    }
    for path in filter(None, (folder / "sweep.json", options.json)):
        write_json(content, path, default=str)
    print_table(console.rich, table_of(grid, findings))
    console.rich.print(f"[dim]{SWEEP_LEGEND}[/dim]")
    console.print_whole(f"\n[bold]{escape(verdict)}[/bold]\n")
    console.extra("results", "sweep.json", f"in {folder}")

    def draw() -> list[Path]:
        from launch.sweep.picture import draw_grid  # imports matplotlib, an extra

        return [draw_grid(grid, findings, verdict, folder / "sweep.png")]

    drawn(draw, folder, console)
    if broken:
        raise _failed(broken)
    console.next_command(*_next(command, parsed, grid, findings))


def keep_aside(folder: Path, command: list[str]) -> None:
    """Give the results of another command in this folder a number, so that nothing is lost: sweep-1.json and .png."""
    try:
        before = json.loads((folder / "sweep.json").read_bytes())["command"]
    except (FileNotFoundError, ValueError, KeyError):
        return
    if before == command:
        return
    number = next(n for n in itertools.count(1) if not (folder / f"sweep-{n}.json").exists())
    for ending in ("json", "png"):
        with contextlib.suppress(FileNotFoundError):
            (folder / f"sweep.{ending}").rename(folder / f"sweep-{number}.{ending}")


def _announce(grid: Grid, missing: Sequence[Point], store: Store, options: SweepOptions, console: Console) -> None:
    """The first screen."""
    plan, num_points = grid.first.plan, len(grid.points)
    asked = len(grid.settings) * len(grid.seeds)
    product = " x ".join(str(len(axis.labels)) for axis in grid.axes if len(axis.labels) > 1)
    settings = f"{len(grid.settings)} settings" + (f" ({product})" if " x " in product else "")
    seeds = f"{len(grid.seeds)} {'seed' if len(grid.seeds) == 1 else 'seeds'}"
    console.print_whole(
        f"[bold]{escape(grid.title)}[/bold]: sweep of {settings} with {seeds} each in the "
        f"reference driver, {plan.steps:,} batches of {grid.first.batch_shape[0]}"
    )
    for axis in grid.axes:
        console.extra(axis.name, ", ".join(axis.labels))
    console.extra("seeds", ", ".join(map(str, grid.seeds)))
    if asked > num_points:
        why = "what must learn the same, bit for bit, is run once: an exact mode at any split, most modes at any delay"
        console.extra("runs", f"{num_points}, not {asked}", why)
    outdated = sum(store.outdated(point) for point in missing)
    there = f"{num_points - len(missing)} of {num_points} are there"
    there += f", {outdated} more of other code are run again" if outdated else ""
    console.extra("to run", f"{len(missing)}", f"{there}; {min(options.num_jobs, max(1, len(missing)))} at a time")
    console.extra("folder", str(store.folder.parent))


def _run(
    grid: Grid,
    missing: Sequence[Point],
    outcomes: dict[str, Outcome],
    store: Store,
    options: SweepOptions,
    console: Console,
) -> list[tuple[str, Broken]]:
    """Run the missing points, remember each as it ends; returns those that broke, by name."""
    broken: list[tuple[str, Broken]] = []
    names = {
        point.key: f"{label_of(grid, setting)}, seed {seed}"
        for setting in reversed(grid.settings)
        for seed, point in setting.points.items()
    }
    ending = contextlib.closing(run_points(missing, options.num_jobs, options.within_s))
    try:
        with console.progress_line("points", len(missing)) as update, ending as ended:
            for number, (point, said) in enumerate(ended, start=1):
                name = names[point.key]
                if isinstance(said, Broken):
                    broken.append((name, said))
                    what = f"failed: {said.message}"
                else:
                    store.put(point, said)
                    outcomes[point.key] = said
                    metric, figure = METRICS[grid.metric], METRICS[grid.metric].of(said)
                    learned = f"diverged: {said.diverged}" if figure is None else metric.said(figure)
                    what = f"{learned}, {said.seconds:.1f} s"
                console.print_whole(escape(f"  {number:>4}/{len(missing)}  {name}: {what}"))
                update(advance=1)
    except KeyboardInterrupt:
        there = f"{len(outcomes)} of {len(grid.points)} points are there"
        console.print_whole(f"  {there}; the same command goes on from here")
        raise
    return broken


def _failed(broken: Sequence[tuple[str, Broken]]) -> RunFailed:
    name, first = broken[0]
    more = f" ({len(broken)} points failed in all)" if len(broken) > 1 else ""
    text = f"{name}: {first.message}{more}; the same command runs it again"
    return RunFailed(text, stage=0, details=first.details)


def _next(command: list[str], parsed: Parsed, grid: Grid, findings: Sequence[Finding]) -> tuple[str, str]:
    """What is missing most: the yardstick, more seeds, or a run of the best in real processes."""
    if not any(f.setting.backprop for f in findings):
        if any("mode" in axis.options for axis in grid.axes):
            command = [re.sub(r"^((?:--vary=)?mode=)", r"\1naive,", argument) for argument in command]
        else:
            command = [*command, "--vary", f"mode={parsed.plan.mode},naive"]
        return shlex.join(command), "beside backpropagation, on the same work"
    if len(grid.seeds) < 3:
        command = [*without(["--seeds"], command), "--seeds", "0,1,2"]
        return shlex.join(command), "how much of it is chance; what is there is not run again"
    whole = [(f.setting.backprop, f.mean, index) for index, f in enumerate(findings) if f.mean is not None]
    best = findings[min(whole, default=(False, 0.0, 0))[2]]  # what is not backpropagation comes first
    what = "backpropagation" if best.setting.backprop else "the best of them"
    arguments = arguments_for(best.setting.wish, left_out=("hop_steps",))
    seconds = statistics.median(outcome.seconds for f in findings for outcome in f.outcomes.values())
    command = ["freewheel", "train", parsed.source.name, *arguments]
    return shlex.join(command), f"{what} in real processes; here a run took {seconds:.0f} s"
