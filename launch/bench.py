"""``freewheel bench``: the same training in several modes, interleaved over rounds, and what the comparison says.

round 1: single, naive, unlocked    round 2: single, naive, unlocked    ...    ratios are taken within a round
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from launch import rundir
from launch.console import Console, stage_table
from launch.options import BenchOptions
from launch.result import SCHEMA, Result
from launch.single import SingleRun, run_single
from launch.spread import Spread
from launch.training import resolve_source, run
from pipeline import DNIPlan, Plan, Recipe
from pipeline.measurements import Measured
from pipeline.resolve import Resolved

__all__ = ["Report", "Row", "bench"]


@dataclass
class Row:
    """One mode over all rounds.

    Attributes:
        engine: ``single`` or ``freewheel``.
        mode: ``backprop`` for a plain loop, else a mode of the plan.
        stages: number of worker processes.
        threads: compute threads of each.
        rates: samples per second of every round.
        results: our own runs, one per round; empty for other engines.
        singles: runs of the plain loop.
    """

    engine: str
    mode: str
    stages: int
    threads: int
    rates: list[float] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    singles: list[SingleRun] = field(default_factory=list)

    @property
    def last(self) -> Result | SingleRun:
        """The last round."""
        return (self.results or self.singles)[-1]

    @property
    def typical(self) -> Measured | None:
        """Our own figures in the round of median speed."""
        if not self.results:
            return None
        middle = sorted(range(len(self.rates)), key=self.rates.__getitem__)[len(self.rates) // 2]
        return self.results[middle].measured

    def speedup(self, other: Row) -> Spread:
        """Throughput over that of another row, round by round."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True)])

    def as_dict(self, yardstick: Row, batch_rows: int) -> dict[str, Any]:
        """One entry of ``rows`` in bench.json; what does not apply is null."""
        measured = self.typical
        stages = measured.stages if measured else ()
        first = stages[0] if stages else None
        latency, age = (first.update_latency_s, first.gradient_age_updates) if first else (None, None)
        peaks = (
            [self.results[-1].finished[k].peak_memory_bytes for k in sorted(self.results[-1].finished)]
            if self.results
            else [self.singles[-1].peak_memory_bytes]
        )
        return {
            "engine": self.engine,
            "mode": self.mode,
            "stages": self.stages,
            "threads": self.threads,
            "microbatches": None,
            "emulated": False,
            "launcher": "local",
            "samples_per_s": Spread.of(self.rates).as_dict(),
            "speedup": self.speedup(yardstick).as_dict(),
            "update_latency_s": {"p50": latency[0], "p99": latency[1]} if latency else None,
            "gradient_age_updates": {"p50": age[0], "max": age[1]} if age else None,
            "busy_share": [stage.busy for stage in stages] or None,
            "bubble_share": [stage.shares["waiting"] for stage in stages] or None,
            "dni_share": [stage.shares["dni"] for stage in stages] or None,
            "peak_memory_bytes": peaks,
            "ledger": _ledger(measured, batch_rows) if measured else None,
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
        rows: the modes; the first one is the yardstick, one process with one thread.
        batch_rows: rows of a batch.
    """

    verdict: str
    command: list[str]
    environment: dict[str, Any]
    rows: list[Row]
    batch_rows: int

    def as_dict(self) -> dict[str, Any]:
        """The fields of bench.json."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "command": self.command,
            "environment": self.environment,
            "rows": [row.as_dict(self.rows[0], self.batch_rows) for row in self.rows],
        }


def bench(
    source: Callable[[], Recipe], plan: Plan, options: BenchOptions, command: list[str], console: Console
) -> Report:
    """Compare one process, locked and unlocked stages on equal work, and print the verdict first.

    Same model, initial weights, batches and optimizer in every mode; the first tenth of the batches warms up.

    Raises:
        PlanError: the plan cannot run.
        RunFailed: a run failed.
    """
    resolved = resolve_source(source, plan)
    locked = resolve_source(source, _locked(resolved.plan))
    modes: list[tuple[Row, Resolved | None]] = [(Row("single", "backprop", 1, plan.threads), None)]
    modes += [(Row("freewheel", r.plan.mode, r.plan.stages, plan.threads), r) for r in (locked, resolved)]
    folder = rundir.new_run_dir(options.runs, options.name or rundir.default_name(source().name, "bench"))
    console.decided(source().name, resolved, folder)
    for number in range(options.rounds):
        for row, wanted in modes:
            with console.rich.status(f"round {number + 1} of {options.rounds}: {row.mode}"):
                _once(row, wanted, source, resolved, folder, number)
    rows = [row for row, _ in modes]
    rows_per_batch = resolved.batch_shape[0]
    report = Report(_verdict(rows[0], rows[1], rows[2], resolved.steps), command, environment(), rows, rows_per_batch)
    _show(report, console)
    return report


def _once(
    row: Row, wanted: Resolved | None, source: Callable[[], Recipe], resolved: Resolved, folder: Path, number: int
) -> None:
    if wanted is None:
        warmup = max(1, min(resolved.steps // 10, resolved.steps - 1))
        single = run_single(source, resolved.plan, threads=row.threads, warmup=warmup)
        row.singles.append(single)
        row.rates.append(single.batches * resolved.batch_shape[0] / single.seconds)
    else:
        result = run(source, wanted, folder, f"{row.mode}-{number + 1}", Console(quiet=True))
        row.results.append(result)
        row.rates.append(result.samples_per_s or float("nan"))


def _locked(plan: Plan) -> Plan:
    """The same work, locked: what only concerns unlocking is left out."""
    defaults = Plan()
    return replace(
        plan,
        mode="naive",
        targets=defaults.targets,
        mix=defaults.mix,
        true_every=1,
        dni=DNIPlan(),
        deterministic=False,
    )


def _verdict(single: Row, locked: Row, unlocked: Row, steps: int) -> str:
    against_locked, against_single = unlocked.speedup(locked), unlocked.speedup(single)
    won = "Unlocked" if against_locked.median > 1 else "Unlocking lost:"
    text = (
        f"{won} {unlocked.stages} stages ran at {against_locked.times()} the speed of the same stages locked, and at "
        f"{against_single.times()} the speed of one process"
    )
    if unlocked.last.accuracy is not None and locked.last.accuracy is not None:
        text += f"; after the same {steps:,} batches {unlocked.last.accuracy:.1%} right"
        text += f" against {locked.last.accuracy:.1%} locked"
    text += "."
    if against_single.median < 1:
        text += " One process alone is faster here: these stages are too small to pay for the messages between them."
    return text


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
    for name in ("samples/s", "x one process", "update ms", "busy %", "dni %", "loss", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        entry = row.as_dict(report.rows[0], report.batch_rows)
        latency, speedup = entry["update_latency_s"], row.speedup(report.rows[0])
        table.add_row(
            "one process" if row.engine == "single" else row.mode,
            f"{entry['samples_per_s']['median']:,.0f}",
            f"{speedup.median:.2f} ({speedup.min:.2f}-{speedup.max:.2f})",
            f"{latency['p50'] * 1e3:.2f}" if latency else "-",
            _percentages(entry["busy_share"]),
            _percentages(entry["dni_share"]),
            f"{entry['loss']:.4f}",
            "-" if entry["accuracy"] is None else f"{entry['accuracy']:.2%}",
        )
    console.rich.print(table)
    for row in report.rows:
        if row.typical is not None:
            console.rich.print(f"\n[bold]{row.mode}[/bold]")
            console.rich.print(stage_table(row.typical))


def _percentages(shares: Sequence[float] | None) -> str:
    return "-" if not shares else " ".join(f"{100 * share:.0f}" for share in shares)


def environment() -> dict[str, Any]:
    """Where this was measured."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "gpus": torch.cuda.device_count(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
