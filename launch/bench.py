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
from launch.instrumentation import PAIR, cost_by_count, cost_of_spans, record_s
from launch.ledger import Account, entry, show_ledger
from launch.options import BenchOptions
from launch.result import SCHEMA
from launch.rows import DEFAULT_ROWS, EMULATED_ROWS, ROWS, Contender, Outcome
from launch.spread import Spread
from launch.training import resolve_source
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
        name = name if c.spans else f"{name}, bare"
        return f"{name} x{c.microbatches}" if c.microbatches else name

    @property
    def exact(self) -> bool:
        """Whether it is one of our modes that equal single-process training."""
        return self.contender.engine == "freewheel" and MODES[self.contender.mode].exact

    @property
    def rates(self) -> list[float]:
        """Samples per second of every round."""
        return [outcome.samples_per_s for outcome in self.outcomes]

    @property
    def last(self) -> Outcome:
        """The last round."""
        return self.outcomes[-1]

    @property
    def middle(self) -> Outcome:
        """The round of median speed."""
        return sorted(self.outcomes, key=lambda outcome: outcome.samples_per_s)[len(self.outcomes) // 2]

    @property
    def typical(self) -> Measured | None:
        """Our own figures in the round of median speed."""
        return self.middle.measured

    @property
    def account(self) -> Account:
        """What a sample cost in the round of median speed."""
        seconds, contender = self.middle.spent_s, self.contender
        total_s = contender.stages / self.middle.samples_per_s
        return Account(name=self.name, seconds=seconds, flop=contender.flop, total_s=total_s, note=contender.note)

    def speedup(self, other: Row) -> Spread:
        """Throughput over that of another row, round by round."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True)])

    def as_dict(self, yardstick: Row, emulated: bool) -> dict[str, Any]:
        """One entry of ``rows`` in bench.json; what does not apply is null."""
        measured, contender = self.typical, self.contender
        stages = measured.stages if measured else ()
        first = stages[0] if stages else None
        latency, age = (first.update_latency_s, first.gradient_age_updates) if first else (None, None)
        return {
            "engine": contender.engine,
            "mode": contender.mode,
            "stages": contender.stages,
            "threads": contender.threads,
            "microbatches": contender.microbatches,
            "spans": contender.spans if contender.engine == "freewheel" else None,
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
            "ledger": entry(self.middle.spent_s, contender.flop),
            "loss": self.last.loss,
            "accuracy": self.last.accuracy,
            "until_s": None,
            "until_samples": None,
        }


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        verdict: the answer in a sentence or two.
        command: what was typed.
        environment: where it was measured.
        rows: the contenders; ratios are over the first one.
        emulated: compute or links were emulated.
        left_out: rows that could not run here, with the reason.
        cost: what the spans cost, where that was compared.
    """

    verdict: str
    command: list[str]
    environment: dict[str, Any]
    rows: list[Row]
    emulated: bool
    left_out: dict[str, str]
    cost: str | None

    def as_dict(self) -> dict[str, Any]:
        """The fields of bench.json."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "command": self.command,
            "environment": self.environment,
            "rows": [row.as_dict(self.rows[0], self.emulated) for row in self.rows],
            "instrumentation": self.cost,
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
    if plan.evaluate_every is not None:
        raise PlanError("a benchmark evaluates once, at the end of each run: leave --evaluate-every out.")
    names = list(PAIR) if options.pairs else _chosen(options.rows, plan)
    resolved = resolve_source(source, plan)
    folder = rundir.new_run_dir(options.runs, options.name or rundir.default_name(source().name, "bench"))
    console.decided(source().name, resolved, folder)
    rows, left_out = _prepared(names, source, resolved, folder, console, everything="all" in options.rows)
    rounds = options.pairs or options.rounds
    for number in range(rounds):
        turns = list(rows.items())
        for name, row in reversed(turns) if options.pairs and number % 2 else turns:
            with console.rich.status(f"round {number + 1} of {rounds}: {row.name}"):
                row.outcomes.append(row.contender.train(folder, f"{name}-{number + 1}"))
    ordered = list(rows.values())
    emulated = plan.emulate is not None or plan.link is not None
    cost = _cost(ordered)
    report = Report(
        cost if options.pairs and cost else _verdict(ordered, resolved.steps, emulated),
        command,
        environment(),
        ordered,
        emulated,
        left_out,
        cost,
    )
    _show(report, console)
    if "all" not in options.rows and not options.pairs:
        console.next_command(shlex.join([*command, "--rows", "all"]), "every rival in the same table")
    return report


def _chosen(wanted: Sequence[str], plan: Plan) -> list[str]:
    """Names of the rows: the yardstick first. Emulated stages have nothing that others could run."""
    for name in wanted:
        if name != "all" and name not in ROWS:
            raise PlanError(nearest(name, [*ROWS, "all"], "row"))
    if plan.emulate is not None or plan.link is not None:
        theirs = [name for name in wanted if name not in (*EMULATED_ROWS, "all", *DEFAULT_ROWS)]
        if theirs:
            raise PlanError(f"{', '.join(theirs)} cannot be emulated: leave it out, or leave out --emulate and --link.")
        return [name for name in EMULATED_ROWS if "all" in wanted or name in wanted]
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


def _verdict(rows: Sequence[Row], steps: int, emulated: bool) -> str:
    """What unlocking bought, against the best of every kind that was run; losses are said like gains."""
    unlocked = next((row for row in rows if row.contender.mode == "unlocked"), None)
    if unlocked is None:
        best = max(rows, key=lambda row: Spread.of(row.rates).median)
        return f"The fastest was {best.name}. Nothing unlocked was run."
    rivals = [
        ("exact locked row", [row for row in rows if row.exact]),
        ("torch.distributed.pipelining row", [row for row in rows if row.contender.engine == "torch"]),
        ("", [row for row in rows if row.contender.engine in ("single", "ddp")]),
    ]
    parts, slower = [], []
    for kind, candidates in rivals:
        chosen = candidates
        if kind and candidates:
            chosen = [max(candidates, key=lambda row: Spread.of(row.rates).median)]
        for row in chosen:
            ratio = unlocked.speedup(row)
            parts.append(f"{ratio.times()} {f'the best {kind} ({row.name})' if kind else row.name}")
            slower += [row.name] if ratio.median < 1 else []
    text = f"Unlocked, {unlocked.contender.stages} stages: throughput {', '.join(parts)}"
    rival = next((row for row in rows if row.exact), rows[0])
    if unlocked.last.accuracy is not None and rival.last.accuracy is not None and not emulated:
        text += f"; after the same {steps:,} batches {unlocked.last.accuracy:.1%} right"
        text += f" against {rival.last.accuracy:.1%} ({rival.name})"
    text += "."
    if slower:
        text += f" Unlocking loses here against {', '.join(slower)}."
    return f"Emulated. {text}" if emulated else text


def _show(report: Report, console: Console) -> None:
    console.rich.print(f"\n[bold]{report.verdict}[/bold]\n")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("mode", overflow="fold")
    scored = report.rows[0].last.accuracy is not None
    for name in (
        "samples/s",
        f"x {report.rows[0].name}",
        "update ms",
        "busy%",
        "dni%",
        "MiB",
        "correct" if scored else "loss",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        figures = row.as_dict(report.rows[0], report.emulated)
        latency, speedup = figures["update_latency_s"], row.speedup(report.rows[0])
        table.add_row(
            row.name,
            f"{figures['samples_per_s']['median']:,.0f}",
            f"{speedup.median:.2f} ({speedup.min:.2f}-{speedup.max:.2f})",
            f"{latency['p50'] * 1e3:.2f}" if latency else "-",
            _percentage(figures["busy_share"]),
            _percentage(figures["dni_share"]),
            f"{max(figures['peak_memory_bytes']) / 2**20:,.0f}",
            f"{figures['accuracy']:.2%}" if scored else f"{figures['loss']:.4f}",
        )
    console.rich.print(table)
    console.rich.print("[dim]MiB: peak memory of the largest process[/dim]")
    for name, reason in report.left_out.items():
        console.rich.print(f"  left out: {name}  [dim]({reason})[/dim]")
    for row in report.rows:
        if row.typical is not None:
            console.rich.print(f"\n[bold]{row.name}[/bold]")
            console.rich.print(stage_table(row.typical))
    _show_ledger(report.rows, console)
    if report.cost is not None and report.cost != report.verdict:
        console.rich.print(report.cost)


def _show_ledger(rows: Sequence[Row], console: Console) -> None:
    unlocked = next((row for row in rows if row.contender.mode == "unlocked"), None)
    alone = next((row for row in rows if row.contender.engine == "single"), None)
    locked = max((row for row in rows if row.exact), key=lambda row: Spread.of(row.rates).median, default=None)
    compared = [row.account if row is not None else None for row in (unlocked, alone, locked)]
    show_ledger(console.rich, [row.account for row in rows], *compared)


def _cost(rows: Sequence[Row]) -> str | None:
    """What the spans cost, if both rows were run."""
    full, bare = (
        [row for row in rows if row.contender.mode == "unlocked" and row.contender.spans is s] for s in (True, False)
    )
    if not full or not bare:
        return None
    counted = [cost_by_count(full[0].typical, record_s())] if full[0].typical is not None else []
    return " ".join([cost_of_spans(full[0].rates, bare[0].rates), *counted])


_SHORT = {"Interleaved1F1B": "Int-1F1B", "InterleavedZeroBubble": "Int-ZeroBubble", "ZBVZeroBubble": "ZBV"}


def _percentage(shares: Sequence[float] | None) -> str:
    """Mean over the stages."""
    return "-" if not shares else f"{100 * sum(shares) / len(shares):.0f}"
