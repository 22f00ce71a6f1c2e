"""What a benchmark found: its rows, the verdict, and how they are shown.

verdict  ->  one table of all rows  ->  race to the goal  ->  where the time of our rows went  ->  quality  ->  ledger
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from launch.bench.cost_ledger import Account, entry, show_ledger
from launch.bench.rows import Contender, RowOutcome
from launch.bench.spread import Spread
from launch.bench.time_to_goal import EXACT, OTHERS, PEERS, UNLOCKED, Line, Race, rivals
from launch.results.dni_quality import QUALITY_LEGEND, StageQuality, quality_table
from launch.results.result import SCHEMA
from launch.show.console import Console, stage_table
from launch.show.tables import print_table
from pipeline import Plan
from pipeline.metrics.measurements import Measured
from pipeline.run.resolved import Resolved
from pipeline.schedule.modes import MODES

__all__ = ["BenchRow", "Report", "bench_verdict", "emulated_by", "show"]


@dataclass
class BenchRow:
    """One way to train, over all rounds.

    Attributes:
        contender: what runs.
        outcomes: one per round.
    """

    contender: Contender
    outcomes: list[RowOutcome] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How the table calls it."""
        c = self.contender
        if c.engine == "single":
            return "one process" if c.threads == 1 else f"one process, {c.threads} threads"
        name = {"ddp": "DDP", "torch": f"torch {_SHORT.get(c.mode, c.mode)}"}.get(c.engine, c.mode)
        name = f"{name}, {c.variant}" if c.variant else name
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
    def rate(self) -> float:
        """Median samples per second."""
        return statistics.median(self.rates)

    @property
    def last(self) -> RowOutcome:
        """The last round."""
        return self.outcomes[-1]

    @property
    def middle(self) -> RowOutcome:
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
        total_s = contender.stages * contender.replicas / self.middle.samples_per_s
        return Account(name=self.name, seconds=seconds, flop=contender.flop, total_s=total_s, note=contender.note)

    @property
    def latency_s(self) -> tuple[float, float] | None:
        """(p50, p99) of the update latency of stage 0, where it is known."""
        return self.typical.stages[0].update_latency_s if self.typical else None

    def mean_percent(self, share: str) -> str:
        """``busy``, ``dni`` or another share of the time of our stages, mean over them; of others a dash."""
        stages = self.typical.stages if self.typical else ()
        shares = [stage.busy if share == "busy" else stage.shares[share] for stage in stages]
        return f"{100 * sum(shares) / len(shares):.0f}" if shares else "-"

    def speedup(self, other: BenchRow) -> Spread:
        """Throughput over that of another row, round by round."""
        return self.line.speedup(other.line)

    def as_dict(self, yardstick: BenchRow, batch_rows: int, emulated: bool) -> dict[str, Any]:
        """One entry of ``rows`` in bench.json; what does not apply is null."""
        measured, contender, line = self.typical, self.contender, self.line
        stages = measured.stages if measured else ()
        age, age_s = (stages[0].gradient_age_updates, stages[0].gradient_age_s) if stages else (None, None)
        return {
            "engine": contender.engine,
            "mode": contender.mode,
            "variant": contender.variant,
            "stages": contender.stages,
            "replicas": contender.replicas,
            "threads": contender.threads,
            "microbatches": contender.microbatches,
            "emulated": emulated,
            "launcher": contender.launcher,
            "samples_per_s": Spread.of(self.rates).as_dict(),
            "predicted_samples_per_s": contender.predicted and contender.predicted * batch_rows,
            "speedup": self.speedup(yardstick).as_dict(),
            "update_latency_s": _named(("p50", "p99"), self.latency_s),
            "gradient_age_updates": _named(("p50", "max"), age),
            "gradient_age_s": _named(("p50", "max"), age_s),
            "busy_share": [stage.busy for stage in stages] or None,
            "bubble_share": [stage.shares["waiting"] for stage in stages] or None,
            "dni_share": [stage.shares["dni"] for stage in stages] or None,
            "peak_memory_bytes": list(self.last.peak_memory_bytes),
            "queue_depth": measured.queue_depth if measured else None,
            "bytes_moved": measured.bytes_moved if measured else None,
            "ledger": entry(self.middle.spent_s, contender.flop),
            "loss": self.last.loss,
            "accuracy": self.last.accuracy,
            "until_s": line.seconds,
            "until_samples": None if line.updates is None else line.updates * batch_rows,
        }


def _named(names: Sequence[str], figures: Sequence[float] | None) -> dict[str, float] | None:
    return dict(zip(names, figures, strict=True)) if figures else None


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        recipe: name of what was trained.
        resolved: the unlocked run; the rows do the same work.
        folder: where the runs of all rows lie.
        verdict: the answer in a sentence or two.
        command: what was typed.
        environment: where it was measured.
        rows: the contenders; ratios are over the first one.
        left_out: rows that could not run here, with the reason.
        race: the way of the rows to ``plan.until``, if there is one.
        quality: of the synthetic gradients, by stage, from a run of its own; empty where nothing was sampled.
    """

    recipe: str
    resolved: Resolved
    folder: Path
    verdict: str
    command: list[str]
    environment: dict[str, Any]
    rows: list[BenchRow]
    left_out: dict[str, str]
    race: Race | None = None
    quality: list[StageQuality] = field(default_factory=list)

    @property
    def batch_rows(self) -> int:
        """Rows of a step."""
        return self.resolved.step_rows

    @property
    def emulated(self) -> bool:
        """Whether compute or links were emulated."""
        return emulated_by(self.resolved.plan)

    @property
    def unlocked(self) -> BenchRow | None:
        """The unlocked row."""
        return next((row for row in self.rows if row.contender.mode == "unlocked"), None)

    @property
    def fastest(self) -> BenchRow:
        """The row of the highest median throughput."""
        return max(self.rows, key=lambda row: row.rate)

    @property
    def best_locked(self) -> BenchRow | None:
        """The fastest of our rows that equal single-process training."""
        return max((row for row in self.rows if row.exact), key=lambda row: row.rate, default=None)

    def beaten_by(self, row: BenchRow) -> bool:
        """Whether a row is faster than the unlocked one, round by round."""
        return self.unlocked is not None and row.speedup(self.unlocked).median > 1

    def as_dict(self) -> dict[str, Any]:
        """The fields of bench.json."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "command": self.command,
            "environment": self.environment,
            "rows": self.row_dicts(),
            "quality": [asdict(each) for each in self.quality] or None,
            "left_out": self.left_out,
            "over_stages": None,
            "over_latency_ms": None,
        }

    def row_dicts(self) -> list[dict[str, Any]]:
        """The entries of ``rows`` in bench.json."""
        return [row.as_dict(self.rows[0], self.batch_rows, self.emulated) for row in self.rows]


def bench_verdict(rows: Sequence[BenchRow], resolved: Resolved, race: Race | None) -> str:
    """What unlocking bought, against the best of every kind that was run; losses are said like gains."""
    unlocked = next((row for row in rows if row.contender.mode == "unlocked"), None)
    if unlocked is None:
        best = max(rows, key=lambda row: row.rate)
        return f"The fastest was {best.name}. Nothing unlocked was run."
    emulated, rounded = emulated_by(resolved.plan), resolved.plan.wire_dtype is not None
    parts, slower = [], []
    for line, called in rivals([row.line for row in rows], lambda line: line.rate):
        ratio = unlocked.line.speedup(line)
        parts.append(f"{ratio.times()} {called.replace('exact ', '') if rounded else called}")
        slower += [line.name] if ratio.median < 1 else []
    replicas = f", {unlocked.contender.replicas} replicas" if unlocked.contender.replicas > 1 else ""
    text = f"Unlocked, {unlocked.contender.stages} stages{replicas}: throughput {', '.join(parts)}"
    rival = next((row for row in rows if row.exact), rows[0])
    if unlocked.last.accuracy is not None and rival.last.accuracy is not None and not emulated and not race:
        text += f"; after the same {resolved.steps:,} batches {unlocked.last.accuracy:.1%} right"
        text += f" against {rival.last.accuracy:.1%} ({rival.name})"
    text += "."
    if slower:
        text += f" Unlocking loses here against {', '.join(slower)}."
    return f"Emulated. {text}{_of_the_limit(unlocked, resolved)}" if emulated else text


def _of_the_limit(unlocked: BenchRow, resolved: Resolved) -> str:
    lengths = resolved.plan.emulation
    if lengths is None or not lengths.stage_ms:
        return ""
    limit = 1e3 / lengths.stage_ms * resolved.step_rows
    share = Spread.of([rate / limit for rate in unlocked.rates])
    return f" It reaches {share.median:.1%} ({share.min:.1%} to {share.max:.1%}) of the limit, a batch per stage time."


def show(report: Report, console: Console) -> None:
    """Print a report: the verdict, the rows, and where the time of our own went."""
    console.rich.print(f"\n[bold]{report.verdict}[/bold]\n")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("mode", overflow="fold")
    scored = report.rows[0].last.accuracy is not None
    outcome = ("cost model",) if report.emulated else ("MiB", "correct" if scored else "loss")
    for name in ("samples/s", f"x {report.rows[0].name}", "update ms", "busy%", "dni%", *outcome):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            row.name,
            f"{row.rate:,.0f}",
            row.speedup(report.rows[0]).brief(),
            f"{row.latency_s[0] * 1e3:.2f}" if row.latency_s else "-",
            row.mean_percent("busy"),
            row.mean_percent("dni"),
            *(_predicted(row, report) if report.emulated else _outcome(row, scored)),
        )
    print_table(console.rich, table)
    if report.emulated:
        console.rich.print("[dim]cost model: samples/s by the same policies on a virtual clock[/dim]")
    else:
        console.rich.print("[dim]MiB: peak memory of the largest process[/dim]")
    if report.race is not None:
        print_table(console.rich, report.race.table())
        console.rich.print(f"[dim]{report.race.note()}[/dim]")
    for name, reason in report.left_out.items():
        console.rich.print(f"  left out: {name}  [dim]({reason})[/dim]")
    for row in report.rows:
        if row.typical is not None:
            console.rich.print(f"\n[bold]{row.name}[/bold]")
            print_table(console.rich, stage_table(row.typical))
    if report.quality:
        console.rich.print()
        print_table(console.rich, quality_table(report.quality))
        console.rich.print(f"[dim]{QUALITY_LEGEND}[/dim]")
    alone = next((row for row in report.rows if row.contender.engine == "single"), None)
    compared = [row.account if row is not None else None for row in (report.unlocked, alone, report.best_locked)]
    show_ledger(console.rich, [row.account for row in report.rows], *compared)


def _outcome(row: BenchRow, scored: bool) -> tuple[str, str]:
    learned = f"{row.last.accuracy:.2%}" if scored else f"{row.last.loss:.4f}"
    return f"{max(row.last.peak_memory_bytes) / 2**20:,.0f}", learned


def _predicted(row: BenchRow, report: Report) -> tuple[str]:
    predicted = row.contender.predicted
    return (f"{predicted * report.batch_rows:,.0f}" if predicted else "-",)


def emulated_by(plan: Plan) -> bool:
    """Whether compute or links are emulated."""
    return plan.emulate is not None or plan.link is not None


_SHORT = {"Interleaved1F1B": "Int-1F1B", "InterleavedZeroBubble": "Int-ZeroBubble", "ZBVZeroBubble": "ZBV"}
