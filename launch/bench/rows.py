"""The rows of a benchmark: every way to train that can be compared, ours and theirs, behind one call each.

ROWS[name](source, resolved, runs, site) -> contender    finds what has to be found first (microbatches); may refuse
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launch.bench.cost_ledger import Work, seconds_of
from launch.bench.global_batch import RecipeSource, global_batches
from launch.bench.rivals import RivalRun, best_microbatches, run_ddp, run_torch_schedule
from launch.bench.single_process import run_single
from launch.bench.where_rows_run import Site
from launch.show.console import Console
from launch.training import run
from pipeline import DNIPlan, Plan, PlanError
from pipeline.metrics.measurements import Measured
from pipeline.plan.device_choice import CPU, first_gpu
from pipeline.plan.goal import Reached
from pipeline.run.cost_model import predicted_batches_per_s
from pipeline.run.flops import count_flops
from pipeline.run.resolved import Resolved
from pipeline.schedule.modes import MODES
from pipeline.wording import said

__all__ = ["DEFAULT_ROWS", "EMULATED_ROWS", "ROWS", "Contender", "RowOutcome"]


@dataclass(frozen=True)
class RowOutcome:
    """One run of one row; what is not known of it is None.

    Attributes:
        samples_per_s: throughput after the warm-up.
        loss: held-out loss, or the last training loss without held-out data.
        accuracy: held-out accuracy, if the recipe counts right answers.
        peak_memory_bytes: of every process.
        measured: from the spans of a run of ours.
        run_dir: where these lie.
        reached: when ``plan.until`` was met.
        spent_s: seconds per sample, summed over the processes, by what they were spent on.
    """

    samples_per_s: float
    loss: float
    accuracy: float | None
    peak_memory_bytes: tuple[int, ...]
    measured: Measured | None = None
    run_dir: Path | None = None
    reached: Reached | None = None
    spent_s: Work | None = None


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row, ready to run.

    Attributes:
        engine: whose code trains: single, ddp, torch or freewheel.
        mode: ``backprop``, a torch schedule, or one of our modes.
        stages: number of processes that share the work of a batch.
        predicted: batches per second by the cost model; None: nothing is emulated, or it cannot say.
        flop: floating-point operations per sample, by what they are for; None: nothing is computed, or see ``note``.
        note: why operations could not be counted.
        variant: what tells the row from that of its mode: another optimizer.
        train: (folder for runs, name) -> one training run, in fresh processes; blocks until it is over.
    """

    engine: str
    mode: str
    stages: int
    threads: int
    microbatches: int | None = None
    predicted: float | None = None
    flop: Work | None = None
    note: str | None = None
    launcher: str = "local"
    replicas: int = 1
    variant: str | None = None
    train: Callable[[Path, str], RowOutcome]


def _single(threads: int, source: RecipeSource, resolved: Resolved, runs: Path, site: Site) -> Contender:
    source, resolved = global_batches(source, resolved)
    device = first_gpu(resolved.devices) or CPU
    train = partial(run_single, source, resolved.plan, look=site.look, device=device)
    return _rival(source, resolved, train, engine="single", mode="backprop", stages=1, threads=threads)


def _ddp(source: RecipeSource, resolved: Resolved, runs: Path, site: Site) -> Contender:
    ranks, threads = resolved.plan.workers, resolved.plan.threads
    _check_plain(resolved, "ddp")
    source, resolved = global_batches(source, resolved)
    train = partial(run_ddp, source, resolved, ranks=ranks, places=site.places)
    return _rival(source, resolved, train, engine="ddp", mode="backprop", stages=ranks, threads=threads)


def _torch(schedule: str, source: RecipeSource, resolved: Resolved, runs: Path, site: Site) -> Contender:
    _check_plain(resolved, f"torch's {schedule}")
    source, resolved = global_batches(source, resolved)
    stages, threads = resolved.plan.stages, resolved.plan.threads
    tried = best_microbatches(source, resolved, schedule, threads=threads, places=site.places)
    parts = max(tried, key=tried.__getitem__)
    train = partial(run_torch_schedule, source, resolved, schedule, microbatches=parts, places=site.places)
    return _rival(
        source, resolved, train, engine="torch", mode=schedule, stages=stages, threads=threads, microbatches=parts
    )


def _rival(
    source: RecipeSource, resolved: Resolved, train: Callable[..., RivalRun], *, threads: int, **described: Any
) -> Contender:
    """Operations are those of the unsplit model: a cut adds no product, nor does splitting the backward pass."""
    plan = replace(_in_mode(resolved.plan, "naive"), stages=1, sizes=(sum(resolved.sizes),))

    def once(runs: Path, name: str) -> RowOutcome:
        done = train(threads=threads, warmup=resolved.warmup)
        samples, spent = done.batches * resolved.batch_shape[0], None
        if done.forward_s is not None and done.backward_s is not None:
            rest_s = done.seconds - done.forward_s - done.backward_s
            parts = {"forward": done.forward_s, "backward": done.backward_s, "other": rest_s}
            spent = Work(**{name: seconds / samples for name, seconds in parts.items()})
        rate, peaks = samples / done.seconds, done.peak_memory_bytes
        return RowOutcome(rate, done.loss, done.accuracy, peaks, reached=done.reached, spent_s=spent)

    return Contender(train=once, threads=threads, **described, **_counted(source, resolved, plan))


def _check_plain(resolved: Resolved, who: str) -> None:
    """Rivals compute on the CPU in float32 so far: beside rows that do not, their figures would say nothing."""
    plan, gpu = resolved.plan, first_gpu(resolved.devices)
    options = {f"device {gpu}": gpu, f"autocast {plan.autocast}": plan.autocast, "compile": plan.compile}
    if given := [option for option, value in options.items() if value]:
        raise PlanError(f"{who} is compared on the CPU in float32 only: leave {' and '.join(given)} out, or that row.")


def _ours(
    mode: str, source: RecipeSource, resolved: Resolved, runs: Path, site: Site, variant: str | None = None
) -> Contender:
    plan = _in_mode(resolved.plan, mode)
    if variant == "nadamw":  # as Ajanthan et al. 2025 train asynchronously; the warm-up is here a tenth
        warmup_steps = plan.optimizer.warmup_steps or max(1, resolved.steps // 10)
        nesterov = replace(plan.optimizer, rule="nadamw", momentum=None, warmup_steps=warmup_steps)  # momentum 0.99
        plan = replace(plan, optimizer=nesterov)
    cuts = MODES[mode].cuts_batches
    if cuts and plan.microbatches == 1:
        plan = replace(plan, microbatches=_fastest_cut(source, plan, resolved.batch_shape[0], runs, site))
    mine = site.resolve(source, plan)
    return Contender(
        engine="freewheel",
        mode=mode,
        stages=plan.stages,
        threads=plan.threads,
        microbatches=plan.microbatches if cuts else None,
        variant=variant,
        predicted=predicted_batches_per_s(mine.plan, mine.warmup),
        replicas=plan.replicas,
        train=partial(_train_ours, source, mine, site),
        **_counted(source, mine, mine.plan),
    )


def _train_ours(source: RecipeSource, resolved: Resolved, site: Site, runs: Path, name: str) -> RowOutcome:
    result = run(source, resolved, runs, name, Console(quiet=True), launcher=site.launcher)
    peaks = tuple(result.finished[k].peak_memory_bytes for k in sorted(result.finished))
    rate, measured = result.samples_per_s or result.samples / result.seconds, result.measured
    spent = seconds_of(measured, resolved.batch_shape[0]) if measured is not None else None
    return RowOutcome(rate, result.loss, result.accuracy, peaks, measured, result.run_dir, result.reached, spent)


def _fastest_cut(source: RecipeSource, plan: Plan, rows: int, runs: Path, site: Site) -> int:
    """The number of microbatches that runs fastest in a short trial."""
    tried: dict[int, float] = {}
    short = replace(plan, steps=12, evaluate_every=None, until=None)
    for parts in (parts for parts in (2, 4, 8) if rows % parts == 0):
        trial = site.resolve(source, replace(short, microbatches=parts))
        tried[parts] = _train_ours(source, trial, site, runs, f"{plan.mode}-trial-{parts}").samples_per_s
    if not tried:
        raise PlanError(f"{plan.mode} needs a batch that 2, 4 or 8 divides, not {rows} rows: change --batch.")
    return max(tried, key=tried.__getitem__)


def _in_mode(plan: Plan, mode: str) -> Plan:
    """The same work in another mode; what only concerns the plan's own mode is left out."""
    if mode == plan.mode:
        return plan
    kind, defaults = MODES[mode], Plan()
    of_unlocked = ("targets", "mix", "quality_every", "warmup_steps", "unlock", "unlock_cosine")
    return replace(
        plan,
        mode=mode,
        microbatches=plan.microbatches if kind.cuts_batches else 1,
        average_every=plan.average_every if kind.averages == "weights" else defaults.average_every,
        dni=DNIPlan(hidden=plan.dni.hidden, lr=plan.dni.lr) if kind.gradient == "local" else DNIPlan(),
        deterministic=False,
        hop_steps=0.0,
        **{name: getattr(defaults, name) for name in of_unlocked},
    )


def _counted(source: RecipeSource, resolved: Resolved, plan: Plan) -> dict[str, Any]:
    """``flop`` and ``note`` of a contender that runs ``plan``, by a look at the real stages."""
    if plan.emulation is not None:
        return {}
    try:
        stages = count_flops(source(), plan, resolved.cuts)
    except Exception as error:  # the run meets it too and says where; a count is not worth a benchmark
        return {"note": said(error)}
    return {"flop": Work.of_flops(stages, resolved.batch_shape[0])}


ROWS: dict[str, Callable[[RecipeSource, Resolved, Path, Site], Contender]] = {
    "backprop": partial(_single, 1),
    "backprop-all-cores": partial(_single, os.cpu_count() or 1),
    "ddp": _ddp,
    "torch-gpipe": partial(_torch, "GPipe"),
    "torch-1f1b": partial(_torch, "1F1B"),
    "torch-interleaved-1f1b": partial(_torch, "Interleaved1F1B"),
    "torch-interleaved-zero-bubble": partial(_torch, "InterleavedZeroBubble"),
    "torch-zbv-zero-bubble": partial(_torch, "ZBVZeroBubble"),
    **{mode: partial(_ours, mode) for mode in MODES},
    "async-1f1b-nadamw": partial(_ours, "async-1f1b", variant="nadamw"),
}
"""Rows by name, in the order of the table."""

DEFAULT_ROWS = ("backprop", "naive", "unlocked")
EMULATED_ROWS = tuple(MODES)
"""Rows that emulated stages and links can run."""
