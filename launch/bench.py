"""``freewheel bench``: the same training in several ways, interleaved over rounds, and what the comparison says.

round 1: backprop, naive, unlocked    round 2: backprop, naive, unlocked    ...    ratios are taken within a round
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from launch import rundir
from launch.console import Console, stage_table
from launch.environment import environment
from launch.options import BenchOptions
from launch.result import SCHEMA
from launch.rows import DEFAULT_ROWS, ROWS, Contender, Outcome
from launch.spread import Spread
from launch.training import resolve_source
from launch.until import EXACT, OTHERS, PEERS, UNLOCKED, Line, Race, break_even, rivals
from pipeline import Plan, PlanError, Recipe, nearest
from pipeline.measurements import Measured
from pipeline.modes import MODES
from pipeline.resolve import Resolved

__all__ = ["Report", "Row", "bench"]


@dataclass
class Row:
    """One way to train, over all rounds.

    Attributes:
        contender: what runs.
        outcomes: one per round.
    """

    contender: Contender
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How the table calls it."""
        c = self.contender
        if c.engine == "single":
            return "one process" if c.threads == 1 else f"one process, {c.threads} threads"
        name = {"ddp": "DDP", "torch": f"torch {_SHORT.get(c.mode, c.mode)}"}.get(c.engine, c.mode)
        return f"{name} x{c.microbatches}" if c.microbatches else name

    @property
    def exact(self) -> bool:
        """Whether it is one of our modes that equal single-process training."""
        return self.contender.engine == "freewheel" and MODES[self.contender.mode].exact

    @property
    def line(self) -> Line:
        """The row as the verdict sees it."""
        engine = self.contender.engine
        ours = UNLOCKED if self.contender.mode == "unlocked" else EXACT if self.exact else OTHERS
        kind = {"freewheel": ours, "torch": PEERS}.get(engine, "")
        return Line(self.name, kind, self.rates, [outcome.reached for outcome in self.outcomes])

    @property
    def rates(self) -> list[float]:
        """Samples per second of every round."""
        return [outcome.samples_per_s for outcome in self.outcomes]

    @property
    def last(self) -> Outcome:
        """The last round."""
        return self.outcomes[-1]

    @property
    def typical(self) -> Measured | None:
        """Our own figures in the round of median speed."""
        middle = sorted(range(len(self.rates)), key=self.rates.__getitem__)[len(self.rates) // 2]
        return self.outcomes[middle].measured

    def speedup(self, other: Row) -> Spread:
        """Throughput over that of another row, round by round."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True)])

    def as_dict(self, yardstick: Row, batch_rows: int, emulated: bool) -> dict[str, Any]:
        """One entry of ``rows`` in bench.json; what does not apply is null."""
        measured, contender, line = self.typical, self.contender, self.line
        stages = measured.stages if measured else ()
        first = stages[0] if stages else None
        latency, age = (first.update_latency_s, first.gradient_age_updates) if first else (None, None)
        return {
            "engine": contender.engine,
            "mode": contender.mode,
            "stages": contender.stages,
            "threads": contender.threads,
            "microbatches": contender.microbatches,
            "emulated": emulated,
            "launcher": "local",
            "samples_per_s": Spread.of(self.rates).as_dict(),
            "speedup": self.speedup(yardstick).as_dict(),
            "update_latency_s": {"p50": latency[0], "p99": latency[1]} if latency else None,
            "gradient_age_updates": {"p50": age[0], "max": age[1]} if age else None,
            "busy_share": [stage.busy for stage in stages] or None,
            "bubble_share": [stage.shares["waiting"] for stage in stages] or None,
            "dni_share": [stage.shares["dni"] for stage in stages] or None,
            "peak_memory_bytes": list(self.last.peak_memory_bytes),
            "ledger": _ledger(measured, batch_rows) if measured else None,
            "loss": self.last.loss,
            "accuracy": self.last.accuracy,
            "until_s": line.seconds,
            "until_samples": None if line.updates is None else line.updates * batch_rows,
        }


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        verdict: the answer in a sentence or two.
        command: what was typed.
        environment: where it was measured.
        rows: the contenders; ratios are over the first one.
        batch_rows: rows of a batch.
        emulated: compute or links were emulated.
        left_out: rows that could not run here, with the reason.
        race: the way of the rows to ``plan.until``, if there is one.
    """

    verdict: str
    command: list[str]
    environment: dict[str, Any]
    rows: list[Row]
    batch_rows: int
    emulated: bool
    left_out: dict[str, str]
    race: Race | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields of bench.json."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "command": self.command,
            "environment": self.environment,
            "rows": [row.as_dict(self.rows[0], self.batch_rows, self.emulated) for row in self.rows],
            "left_out": self.left_out,
        }


def bench(
    source: Callable[[], Recipe], plan: Plan, options: BenchOptions, command: list[str], console: Console
) -> Report:
    """Compare ways to train on equal work, and print the verdict first.

    Same model, initial weights, batches and optimizer in every row; the first tenth of the batches warms up.

    Raises:
        PlanError: the plan, or a row that was asked for by name, cannot run.
        RunFailed: a run failed.
    """
    if plan.evaluate_every is not None and plan.until is None:
        raise PlanError("a benchmark evaluates once, at the end of each run: leave --evaluate-every out, or add until.")
    names = _chosen(options.rows, plan)
    resolved = resolve_source(source, plan)
    folder = rundir.new_run_dir(options.runs, options.name or rundir.default_name(source().name, "bench"))
    console.decided(source().name, resolved, folder)
    rows, left_out = _prepared(names, source, resolved, folder, console, everything="all" in options.rows)
    for number in range(options.rounds):
        for name, row in rows.items():
            with console.rich.status(f"round {number + 1} of {options.rounds}: {row.name}"):
                row.outcomes.append(row.contender.train(folder, f"{name}-{number + 1}"))
    ordered = list(rows.values())
    emulated = plan.emulate is not None or plan.link is not None
    lines, goal = [row.line for row in ordered], resolved.plan.goal
    race = Race(goal, resolved, lines) if goal is not None else None
    sentences = [_verdict(ordered, resolved.steps, emulated, race), break_even(lines), race.verdict() if race else ""]
    report = Report(
        " ".join(sentence for sentence in sentences if sentence),
        command,
        environment(),
        ordered,
        resolved.batch_shape[0],
        emulated,
        left_out,
        race,
    )
    _show(report, console)
    if "all" not in options.rows:
        console.next_command(shlex.join([*command, "--rows", "all"]), "every rival in the same table")
    return report


def _chosen(wanted: Sequence[str], plan: Plan) -> list[str]:
    """Names of the rows: the yardstick first. Emulated stages have nothing that others could run."""
    for name in wanted:
        if name != "all" and name not in ROWS:
            raise PlanError(nearest(name, [*ROWS, "all"], "row"))
    ours = list(MODES)
    if plan.emulate is not None or plan.link is not None:
        theirs = [name for name in wanted if name not in (*ours, "all", *DEFAULT_ROWS)]
        if theirs:
            raise PlanError(f"{', '.join(theirs)} cannot be emulated: leave it out, or leave out --emulate and --link.")
        return [name for name in ours if "all" in wanted or name in wanted]
    return [name for name in ROWS if name == "backprop" or "all" in wanted or name in wanted]


def _prepared(
    names: Sequence[str],
    source: Callable[[], Recipe],
    resolved: Resolved,
    folder: Path,
    console: Console,
    *,
    everything: bool,
) -> tuple[dict[str, Row], dict[str, str]]:
    rows, left_out = {}, {}
    for name in names:
        try:
            with console.rich.status(f"preparing {name}"):
                rows[name] = Row(ROWS[name](source, resolved, folder))
        except PlanError as error:
            if not everything:
                raise
            left_out[name] = str(error)
    return rows, left_out


def _verdict(rows: Sequence[Row], steps: int, emulated: bool, race: Race | None) -> str:
    """What unlocking bought, against the best of every kind that was run; losses are said like gains."""
    unlocked = next((row for row in rows if row.contender.mode == "unlocked"), None)
    if unlocked is None:
        best = max(rows, key=lambda row: Spread.of(row.rates).median)
        return f"The fastest was {best.name}. Nothing unlocked was run."
    parts, slower = [], []
    for line, called in rivals([row.line for row in rows], lambda line: line.rate):
        ratio = unlocked.line.speedup(line)
        parts.append(f"{ratio.times()} {called}")
        slower += [line.name] if ratio.median < 1 else []
    text = f"Unlocked, {unlocked.contender.stages} stages: throughput {', '.join(parts)}"
    rival = next((row for row in rows if row.exact), rows[0])
    if unlocked.last.accuracy is not None and rival.last.accuracy is not None and not emulated and not race:
        text += f"; after the same {steps:,} batches {unlocked.last.accuracy:.1%} right"
        text += f" against {rival.last.accuracy:.1%} ({rival.name})"
    text += "."
    if slower:
        text += f" Unlocking loses here against {', '.join(slower)}."
    return f"Emulated. {text}" if emulated else text


def _ledger(measured: Measured, batch_rows: int) -> dict[str, float | None]:
    """Seconds per sample, summed over the stages; floating-point operations are not counted yet."""
    samples = measured.batches * batch_rows
    names = ("forward", "backward", "dni", "relay", "communication", "waiting")
    seconds = {
        f"{name}_s": sum(stage.shares[name] for stage in measured.stages) * measured.seconds / samples for name in names
    }
    return {**seconds, **{f"{name}_flop": None for name in names}}


def _show(report: Report, console: Console) -> None:
    console.rich.print(f"\n[bold]{report.verdict}[/bold]\n")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("mode", no_wrap=True)
    scored = report.rows[0].last.accuracy is not None
    for name in (
        "samples/s",
        f"x {report.rows[0].name}",
        "update ms",
        "busy%",
        "dni%",
        "correct" if scored else "loss",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        entry = row.as_dict(report.rows[0], report.batch_rows, report.emulated)
        latency, speedup = entry["update_latency_s"], row.speedup(report.rows[0])
        table.add_row(
            row.name,
            f"{entry['samples_per_s']['median']:,.0f}",
            f"{speedup.median:.2f} ({speedup.min:.2f}-{speedup.max:.2f})",
            f"{latency['p50'] * 1e3:.2f}" if latency else "-",
            _percentage(entry["busy_share"]),
            _percentage(entry["dni_share"]),
            f"{entry['accuracy']:.2%}" if scored else f"{entry['loss']:.4f}",
        )
    console.rich.print(table)
    if report.race is not None:
        console.rich.print(report.race.table())
        console.rich.print(f"[dim]{report.race.note()}[/dim]")
    for name, reason in report.left_out.items():
        console.rich.print(f"  left out: {name}  [dim]({reason})[/dim]")
    for row in report.rows:
        if row.typical is not None:
            console.rich.print(f"\n[bold]{row.name}[/bold]")
            console.rich.print(stage_table(row.typical))


_SHORT = {"Interleaved1F1B": "Int-1F1B", "InterleavedZeroBubble": "Int-ZeroBubble", "ZBVZeroBubble": "ZBV"}


def _percentage(shares: Sequence[float] | None) -> str:
    """Mean over the stages."""
    return "-" if not shares else f"{100 * sum(shares) / len(shares):.0f}"
