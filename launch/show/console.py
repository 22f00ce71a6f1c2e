"""What the user sees of a run: what was decided and why, how it goes, what came out, and what to do next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, combinations
from pathlib import Path

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch.results.dni_quality import QUALITY_LEGEND, quality_table
from launch.results.result import Result
from launch.show.tables import print_table
from pipeline.metrics.measurements import Measured, StageMeasured
from pipeline.model.optimizers import described
from pipeline.plan.channel_choice import CHANNELS, kind_between
from pipeline.run.resolved import Resolved
from pipeline.wording import escaped
from workers.telemetry import records
from workers.wiring.run_memory import needed_bytes

__all__ = ["Console", "stage_table", "switch_line", "switch_summary", "without"]

_COLUMNS = ("forward", "backward", "dni", "relay", "communication", "load", "evaluate", "waiting", "other")


class Console:
    """The driver's one console, fed by all workers; a quiet one prints nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.rich = RichConsole(quiet=quiet, highlight=False)
        self._update: Callable[..., None] = _nothing  # the progress line, while there is one

    def decided(self, recipe: str, resolved: Resolved, run_dir: Path) -> None:
        """The first screen."""
        plan = resolved.plan
        self.rich.print(
            f"[bold]{_shown(recipe)}[/bold]: {plan.mode}, {plan.stages} {'stage' if plan.stages == 1 else 'stages'}, "
            f"{resolved.steps:,} batches of {resolved.batch_shape[0]}"
            f"{f' in each of {plan.replicas} replicas' if plan.replicas > 1 else ''}, seed {plan.seed}"
        )
        self.rich.print(_stages_table(resolved))
        decisions = list(resolved.reasons)
        if plan.unlocked and plan.stages > 1:
            decisions.append(("targets", plan.targets, _TARGETS[plan.targets]))
        decisions.append(("optimizer", described(plan.optimizer), "one per stage"))
        if plan.workers > 1:
            decisions.append(("channels", *_channels(resolved)))
        for decision in decisions:
            self.rich.print(_decision_line(*decision))
        self.print_whole(f"  {'threads':<10} {plan.threads} per worker\n  {'run':<10} {_shown(run_dir)}")

    @contextlib.contextmanager
    def progress_line(self, what: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress line while this lasts; gives ``update(**fields)`` as of ``rich.progress.Progress``."""
        text, loss = TextColumn("  {task.description}"), TextColumn("{task.fields[loss]}")
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), loss)
        shown = self.rich.is_terminal and total > 0  # elsewhere it would leave an empty line
        with Progress(*columns, console=self.rich, transient=True, disable=not shown) as progress:
            self._update = partial(progress.update, progress.add_task(what, total=total, loss=""))
            try:
                yield self._update
            finally:
                self._update = _nothing

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

    def switched(self, record: records.Switched) -> None:
        """A stage locked or unlocked."""
        self.rich.print(f"  {switch_line(record)}")

    def finished(self, result: Result) -> None:
        """The last screen of a training run."""
        self.print_whole(f"\n[bold]{_shown(result.summary())}[/bold]")
        if result.measured is not None:
            print_table(self.rich, stage_table(result.measured))
            self.rich.print(f"[dim]{_legend(result.measured)}[/dim]")
        if result.quality:
            print_table(self.rich, quality_table(result.quality))
            self.rich.print(f"[dim]{QUALITY_LEGEND}[/dim]")
        for line in switch_summary(result):
            self.print_whole(f"  {line}")
        if dropped := sum(record.dropped for record in result.finished.values()):
            self.rich.print(f"  {dropped:,} targets were dropped: raise --channel.gradient-slots")

    def extra(self, what: str, value: str, why: str = "") -> None:
        """One more line, as of what was written, or could not be."""
        self.print_whole(f"  {what:<10} {_shown(value)}" + (f"  [dim]({_shown(why)})[/dim]" if why else ""))

    def next_command(self, command: str, why: str) -> None:
        """What to try now."""
        self.print_whole(f"  next: [bold]{_shown(command)}[/bold]\n        [dim]({why})[/dim]")

    def print_whole(self, text: str) -> None:
        """Print lines that somebody may copy: never broken, however narrow the terminal."""
        self.rich.print(text, soft_wrap=True)


def without(left_out: Sequence[str], arguments: Sequence[str]) -> Iterator[str]:
    """The arguments but for some options with their values: ``--mode naive``, ``--mode=naive``, all ``--dni.``."""
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if not any(name == option or (option.endswith(".") and name.startswith(option)) for option in left_out):
            yield argument
        elif not equals:
            next(rest, None)


def switch_line(record: records.Switched) -> str:
    """``stage 1 unlocked at batch 240 (cosine 0.62, norm ratio 0.41)``."""
    where = f"stage {record.stage}" if record.replica == 0 else f"replica {record.replica}, stage {record.stage}"
    text = f"{where} {'locked again' if record.locked else 'unlocked'} at batch {record.batch:,}"
    if record.cosine is None or record.norm_ratio is None:
        return f"{text} (the warm-up is over)"
    return f"{text} (cosine {record.cosine:.2f}, norm ratio {record.norm_ratio:.2g})"


def switch_summary(result: Result) -> Iterator[str]:
    """A line per stage of replica 0 that has a DNI; nothing for a run that is unlocked from its first batch on."""
    plan = result.resolved.plan
    if not plan.warmup_steps and plan.unlock == "always":
        return
    for stage in range(plan.stages - 1):
        mine = sorted(s.batch for s in result.switches if (s.stage, s.replica) == (stage, 0))
        edges = [*mine, result.steps]  # it begins locked: unlocked from every second switch on
        unlocked = sum(max(0, end - begin) for begin, end in zip(edges[::2], edges[1::2], strict=False))
        share = unlocked / result.steps if result.steps else 0.0
        times = f"{len(mine)} switch{'' if len(mine) == 1 else 'es'}"
        yield f"stage {stage}: unlocked for {share:.0%} of the batches, {times}"


def stage_table(measured: Measured) -> Table:
    """Where the time of every stage went."""
    table = Table(title="where the time went, %", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    shown = [name for name in _COLUMNS if any(stage.shares[name] >= 5e-4 for stage in measured.stages)]
    extra = _extra_columns(measured)
    for name in (*(_SHORT.get(name, name) for name in shown), "update ms", *extra):
        table.add_column(name, justify="right", no_wrap=True)
    for index, stage in enumerate(measured.stages):
        place = divmod(index, len(measured.stages) // measured.replicas)
        table.add_row(
            str(index) if measured.replicas == 1 else "{}.{}".format(*place),
            *(f"{100 * stage.shares[name]:.1f}" for name in shown),
            "-" if stage.update_latency_s is None else f"{stage.update_latency_s[0] * 1e3:.2f}",
            *(_EXTRA[name][1](stage) or "-" for name in extra),
        )
    return table


def _nothing(**values: object) -> None:
    """There is no progress line."""


def _shown(text: object) -> str:
    """Text of others as it is printed."""
    return escape(str(escaped(str(text))))


def _extra_columns(measured: Measured) -> list[str]:
    return [name for name, (_, cell) in _EXTRA.items() if any(cell(stage) for stage in measured.stages)]


def _legend(measured: Measured) -> str:
    """What the last columns of the stage table are."""
    lines = ["update ms: from the end of a batch's forward to the end of its update"]
    lines += ["stage: replica.stage"] if measured.replicas > 1 else []
    return "\n".join([*lines, *(f"{name}: {_EXTRA[name][0]}" for name in _extra_columns(measured))])


_EXTRA: dict[str, tuple[str, Callable[[StageMeasured], str | None]]] = {
    "age": (
        "updates a stage makes before the target of a batch comes back",
        lambda stage: stage.gradient_age_updates and f"{stage.gradient_age_updates[0]:.0f}",
    ),
    "queue": (
        "batches that wait in front of the stage when it begins one, median/max",
        lambda stage: stage.queue_depth and "{:.0f}/{:.0f}".format(*stage.queue_depth),
    ),
}
"""Columns that are there where a stage has something to say: what they mean, and the cell."""
_SHORT = {"communication": "comm", "evaluate": "eval", "waiting": "wait", "backward": "back+step"}
_TARGETS = {
    "bootstrap": "a DNI learns from the synthetic gradient above it",
    "true": "every DNI learns from the true gradient, late",
    "mixed": "a DNI learns from both",
}


def _channels(resolved: Resolved) -> tuple[str, str]:
    """What carries the messages and why; cut by cut where that differs."""
    plan, choices, slots = resolved.plan, resolved.channels, f"{resolved.plan.channel.slots} slots"
    mebibytes = needed_bytes(resolved) / 2**20
    memory = f"; {mebibytes:.1f} MiB" if mebibytes else ""
    if not choices:
        places = zip(resolved.hosts, resolved.devices, strict=True)
        kinds = {kind_between(plan.channels, *pair, nccl=resolved.nccl) for pair in combinations(places, 2)}
        return " and ".join(CHANNELS[kind] for kind in sorted(kinds)), f"between the replicas{memory}"
    if len(set(choices)) == 1:
        return f"{CHANNELS[choices[0].kind]}, {slots}", f"{choices[0].why}{memory}"
    cuts = []
    for index, choice in enumerate(choices):
        replica, k = divmod(index, len(resolved.cuts))
        owner = f"{replica}." if plan.replicas > 1 else ""
        cuts.append((f"{owner}{k}-{owner}{k + 1}", choice))
    value = ", ".join(f"{cut} {CHANNELS[choice.kind]}" for cut, choice in cuts)
    why = ", ".join(f"{cut} {choice.why}" for cut, choice in cuts)
    return f"{value}, {slots}", f"{why}{memory}"


def _decision_line(what: str, value: str, why: str) -> Table:
    """One line; a reason that is too long goes on under itself."""
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=11)
    line.add_column()
    line.add_column(style="dim")
    line.add_row(f"  {what}", escape(value), escape(f"({why})"))
    return line


def _stages_table(resolved: Resolved) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("  stage", "layers", "parameters", "measured"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    ends = accumulate(resolved.sizes)
    for index, (size, end) in enumerate(zip(resolved.sizes, ends, strict=True)):
        layers = slice(end - size, end)
        names = resolved.layer_names[layers]
        seconds = f"{sum(resolved.layer_seconds[layers]) * 1e3:.2f} ms" if resolved.layer_seconds else "-"
        span = names[0] if size == 1 else f"{names[0]} .. {names[-1]}"
        table.add_row(str(index), span, f"{sum(resolved.layer_parameters[layers]):,}", seconds)
    return table
