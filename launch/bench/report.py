"""What a benchmark found: its rows, the verdict, and how they are shown.

verdict  ->  one table of all rows  ->  race to the goal  ->  where the time of our rows went  ->  quality  ->  ledger
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from launch.bench.cost_ledger import Account, entry, show_ledger
from launch.bench.rows import Contender, RowOutcome
from launch.bench.spread import Spread
from launch.bench.time_to_goal import EXACT, OTHERS, PEERS, UNLOCKED, Line, Race, break_even, rivals
from launch.results.dni_quality import QUALITY_LEGEND, StageQuality, quality_table
from launch.results.result import SCHEMA
from launch.show.console import Console, stage_table
from launch.show.tables import print_table
from pipeline import Plan
from pipeline.metrics.measurements import Measured
from pipeline.run.resolved import Resolved
from pipeline.schedule.modes import MODES

__all__ = ["BenchRow", "Report", "emulated_by", "show"]

_SHORT = {"Interleaved1F1B": "Int-1F1B", "InterleavedZeroBubble": "Int-ZeroBubble", "ZBVZeroBubble": "ZBV"}


@dataclass
class BenchRow:
    """One way to train, with an outcome per round; ``label`` is what the user asks for it by, and in names of runs."""

    contender: Contender
    outcomes: list[RowOutcome] = field(default_factory=list)
    label: str = ""

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
        """Whether it is one of our modes that equals single-process training."""
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
        c, middle = self.contender, self.middle
        total_s = c.stages * c.replicas / middle.samples_per_s
        return Account(name=self.name, seconds=middle.spent_s, flop=c.flop, total_s=total_s, note=c.note)

    @property
    def latency_s(self) -> tuple[float, float] | None:
        """(p50, p99) of the update latency of stage 0, where it is known."""
        return self.typical.stages[0].update_latency_s if self.typical else None

    def shares(self, name: str) -> list[float] | None:
        """``busy``, ``dni`` or another share of the time of each of our stages; of others None."""
        stages = self.typical.stages if self.typical else ()
        return [stage.busy if name == "busy" else stage.shares[name] for stage in stages] or None

    def mean_percent(self, name: str) -> str:
        """A share, mean over the stages; of others a dash."""
        shares = self.shares(name)
        return f"{100 * sum(shares) / len(shares):.0f}" if shares else "-"

    def speedup(self, other: BenchRow) -> Spread:
        """Throughput over that of another row, round by round."""
        return self.line.speedup(other.line)

    def as_dict(self, yardstick: BenchRow, batch_rows: int, emulated: bool) -> dict[str, Any]:
        """One entry of ``rows`` in bench.json; what does not apply is null."""
        measured, contender, line = self.typical, self.contender, self.line
        first = measured.stages[0] if measured else None
        described = ("engine", "mode", "variant", "stages", "replicas", "threads", "microbatches")
        return {
            **{name: getattr(contender, name) for name in described},
            "emulated": emulated,
            "launcher": contender.launcher,
            "samples_per_s": asdict(Spread.of(self.rates)),
            "predicted_samples_per_s": contender.predicted and contender.predicted * batch_rows,
            "speedup": asdict(self.speedup(yardstick)),
            "update_latency_s": _named(("p50", "p99"), self.latency_s),
            "gradient_age_updates": _named(("p50", "max"), first.gradient_age_updates if first else None),
            "gradient_age_s": _named(("p50", "max"), first.gradient_age_s if first else None),
            "busy_share": self.shares("busy"),
            "bubble_share": self.shares("waiting"),
            "dni_share": self.shares("dni"),
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
    """What a benchmark found, once its rows have an outcome or more.

    Attributes:
        recipe: name of what was trained.
        resolved: the unlocked run; the rows do the same work.
        folder: where the runs of all rows lie.
        rows: ratios are over the first one.
        left_out: rows that could not run here, with the reason.
        quality: of the synthetic gradients, by stage, from a run of its own; empty where nothing was sampled.
    """

    recipe: str
    resolved: Resolved
    folder: Path
    command: list[str]
    environment: dict[str, Any]
    rows: list[BenchRow]
    left_out: dict[str, str]
    quality: list[StageQuality] = field(default_factory=list)

    @property
    def emulated(self) -> bool:
        return emulated_by(self.resolved.plan)

    @property
    def unlocked(self) -> BenchRow | None:
        return next((row for row in self.rows if row.contender.mode == "unlocked"), None)

    @property
    def fastest(self) -> BenchRow:
        """The row of the highest median throughput."""
        return max(self.rows, key=lambda row: row.rate)

    @property
    def best_locked(self) -> BenchRow | None:
        """The fastest of our rows that equal single-process training."""
        return max((row for row in self.rows if row.exact), key=lambda row: row.rate, default=None)

    @property
    def race(self) -> Race | None:
        """The way of the rows to ``plan.until``, if there is one."""
        goal = self.resolved.plan.goal
        return Race(goal, self.resolved, [row.line for row in self.rows]) if goal is not None else None

    @property
    def verdict(self) -> str:
        """The answer in a sentence or two."""
        race, lines = self.race, [row.line for row in self.rows]
        return " ".join(filter(None, (_bought(self), break_even(lines), race.verdict() if race else "")))

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
        return [row.as_dict(self.rows[0], self.resolved.step_rows, self.emulated) for row in self.rows]


def _bought(report: Report) -> str:
    """What unlocking bought, against the best of every kind that was run; losses are said like gains."""
    rows, resolved, unlocked = report.rows, report.resolved, report.unlocked
    if unlocked is None:
        return f"The fastest was {report.fastest.name}. Nothing unlocked was run."
    rounded = resolved.plan.wire_dtype is not None
    parts, slower = [], []
    for line, called in rivals([row.line for row in rows], lambda line: line.rate):
        ratio = unlocked.line.speedup(line)
        parts.append(f"{ratio.times()} {called.replace('exact ', '') if rounded else called}")
        slower += [line.name] if ratio.median < 1 else []
    replicas = f", {unlocked.contender.replicas} replicas" if unlocked.contender.replicas > 1 else ""
    text = f"Unlocked, {unlocked.contender.stages} stages{replicas}: throughput {', '.join(parts)}"
    rival = next((row for row in rows if row.exact), rows[0])
    alike = not report.emulated and report.race is None
    if alike and unlocked.last.accuracy is not None and rival.last.accuracy is not None:
        text += f"; after the same {resolved.steps:,} batches {unlocked.last.accuracy:.1%} right"
        text += f" against {rival.last.accuracy:.1%} ({rival.name})"
    text += f". Unlocking loses here against {', '.join(slower)}." if slower else "."
    return f"Emulated. {text}{_of_the_limit(unlocked, resolved)}" if report.emulated else text


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
    scored = report.rows[0].last.accuracy is not None
    outcome = ("cost model",) if report.emulated else ("MiB", "correct" if scored else "loss")
    names = ("samples/s", f"x {report.rows[0].name}", "update ms", "busy%", "dni%", *outcome)
    figures = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("mode", overflow="fold"), *figures, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for row in report.rows:
        table.add_row(
            row.name,
            f"{row.rate:,.0f}",
            row.speedup(report.rows[0]).brief(),
            f"{row.latency_s[0] * 1e3:.2f}" if row.latency_s else "-",
            row.mean_percent("busy"),
            row.mean_percent("dni"),
            *_outcome(row, report),
        )
    print_table(console.rich, table)
    by_model = "cost model: samples/s by the same policies on a virtual clock"
    console.rich.print(f"[dim]{by_model if report.emulated else 'MiB: peak memory of the largest process'}[/dim]")
    if (race := report.race) is not None:
        print_table(console.rich, race.table())
        console.rich.print(f"[dim]{race.note()}[/dim]")
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


def _outcome(row: BenchRow, report: Report) -> list[str]:
    if report.emulated:
        predicted = row.contender.predicted
        return [f"{predicted * report.resolved.step_rows:,.0f}" if predicted else "-"]
    scored = report.rows[0].last.accuracy is not None
    learned = f"{row.last.accuracy:.2%}" if scored else f"{row.last.loss:.4f}"
    return [f"{max(row.last.peak_memory_bytes) / 2**20:,.0f}", learned]


def emulated_by(plan: Plan) -> bool:
    """Whether compute or links are emulated."""
    return plan.emulate is not None or plan.link is not None
