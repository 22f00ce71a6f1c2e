"""What the user sees of a run: what was decided and why, how it goes, what came out, and what to do next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch.result import Result
from pipeline.measurements import Measured
from pipeline.resolve import Resolved
from workers import records
from workers.shared import needed_bytes

__all__ = ["Console", "stage_table"]

_COLUMNS = ("forward", "backward", "dni", "relay", "communication", "load", "waiting", "other")


class Console:
    """The driver's one console, fed by all workers.

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.rich = RichConsole(quiet=quiet, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def decided(self, recipe: str, resolved: Resolved, run_dir: Path) -> None:
        """The first screen."""
        plan = resolved.plan
        self.rich.print(
            f"[bold]{recipe}[/bold]: {plan.mode}, {plan.stages} stages, {resolved.steps:,} batches of "
            f"{resolved.batch_shape[0]}, seed {plan.seed}"
        )
        self.rich.print(_stages_table(resolved))
        for what, value, why in resolved.reasons:
            self.rich.print(f"  {what:<10} {value}  [dim]({why})[/dim]")
        if plan.unlocked and plan.stages > 1:
            self.rich.print(f"  {'targets':<10} {plan.targets}  [dim]({_TARGETS[plan.targets]})[/dim]")
        rule = plan.optimizer
        self.rich.print(f"  {'optimizer':<10} {rule.rule}, lr {rule.lr:g}  [dim](one per stage)[/dim]")
        if plan.stages > 1:
            mebibytes = needed_bytes(resolved) / 2**20
            self.rich.print(
                f"  {'channels':<10} shared memory, {plan.channel.slots} slots  "
                f"[dim](all workers on this host; {mebibytes:.1f} MiB)[/dim]"
            )
        self.rich.print(f"  {'threads':<10} {plan.threads} per worker\n  {'run':<10} {run_dir}")

    @contextlib.contextmanager
    def training(self, result: Result) -> Iterator[None]:
        """A progress line while the workers run."""
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        with Progress(*columns, console=self.rich, transient=True) as progress:
            self._progress = progress
            self._task = progress.add_task("starting", total=result.resolved.steps, loss="")
            try:
                yield
            finally:
                self._progress = None

    def ready(self, record: records.Ready) -> None:
        """A worker is ready."""
        self._update(description=f"stage {record.stage} ready")

    def progress(self, step: int, loss: float) -> None:
        """The last stage finished ``step`` batches."""
        self._update(completed=step, description="training", loss=f"loss {loss:.4f}")

    def scored(self, record: records.Scored) -> None:
        """A pass over the held-out data is over."""
        accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.2%}"
        self.rich.print(f"  after {record.updates:>6,} batches: held-out loss {record.loss:.4f}{accuracy}")

    def finished(self, result: Result) -> None:
        """The last screen of a training run."""
        self.rich.print(f"\n[bold]{result.summary()}[/bold]")
        if result.resolved.steps > 1:
            self.rich.print(stage_table(result.measured))
        if dropped := sum(record.dropped for record in result.finished.values()):
            self.rich.print(f"  {dropped:,} targets were dropped: raise --channel.gradient-slots")

    def next_command(self, command: str, why: str) -> None:
        """What to try now."""
        self.rich.print(f"  next: [bold]{command}[/bold]  [dim]({why})[/dim]")

    def _update(self, **values: object) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, **values)  # type: ignore[arg-type]


def stage_table(measured: Measured) -> Table:
    """Where the time of every stage went."""
    table = Table(title="where the time went, %", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    shown = [name for name in _COLUMNS if any(stage.shares[name] >= 5e-4 for stage in measured.stages)]
    for name in (*(_SHORT.get(name, name) for name in shown), "update ms", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, stage in enumerate(measured.stages):
        latency = "-" if stage.update_latency_s is None else f"{stage.update_latency_s[0] * 1e3:.2f}"
        age = "-" if stage.gradient_age_updates is None else f"{stage.gradient_age_updates[0]:.0f}"
        table.add_row(str(index), *(f"{100 * stage.shares[name]:.1f}" for name in shown), latency, age)
    return table


_SHORT = {"communication": "send+recv", "waiting": "wait", "backward": "back+step"}
_TARGETS = {
    "bootstrap": "a DNI learns from the synthetic gradient above it",
    "true": "every DNI learns from the true gradient, late",
    "mixed": "a DNI learns from both",
}


def _stages_table(resolved: Resolved) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("  stage", "layers", "parameters", "measured"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    start = 0
    for index, size in enumerate(resolved.sizes):
        layers = slice(start, start + size)
        names = resolved.layer_names[layers]
        seconds = f"{sum(resolved.layer_seconds[layers]) * 1e3:.2f} ms" if resolved.layer_seconds else "-"
        span = names[0] if size == 1 else f"{names[0]} .. {names[-1]}"
        table.add_row(str(index), span, f"{sum(resolved.layer_parameters[layers]):,}", seconds)
        start += size
    return table
