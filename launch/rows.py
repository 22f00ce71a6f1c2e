"""The rows of a benchmark: every way to train that can be compared, ours and theirs, behind one call each.

kind.prepare(source, resolved, threads) -> contender     finds what has to be found first (microbatches); may refuse
contender.run(runs, name) -> Outcome                     one training run, in fresh processes
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from launch.console import Console
from launch.peers import PeerRun, best_microbatches, run_ddp, run_torch_schedule
from launch.single import SingleRun, run_single
from launch.training import resolve_source, run
from pipeline import DNIPlan, Plan, PlanError, Recipe
from pipeline.measurements import Measured
from pipeline.modes import MODES
from pipeline.resolve import Resolved
from pipeline.until import Reached

__all__ = ["DEFAULT_ROWS", "ROWS", "Contender", "Outcome"]

_MICROBATCHES = (2, 4, 8)
_TRIAL_STEPS = 12


@dataclass(frozen=True)
class Outcome:
    """One run of one row.

    Attributes:
        samples_per_s: throughput after the warm-up.
        loss: held-out loss, or the last training loss without held-out data.
        accuracy: held-out accuracy, if the recipe counts right answers.
        peak_memory_bytes: of every process.
        measured: our own figures from the spans; None for what others run, and for a run of one batch.
        run_dir: folder of our own run, where its spans lie; None for what others run.
        reached: when ``plan.until`` was met; None: never, or not asked for.
    """

    samples_per_s: float
    loss: float
    accuracy: float | None
    peak_memory_bytes: tuple[int, ...]
    measured: Measured | None = None
    run_dir: Path | None = None
    reached: Reached | None = None


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row, ready to run.

    Attributes:
        engine: whose code trains: single, ddp, torch or freewheel.
        mode: ``backprop``, a torch schedule, or one of our modes.
        stages: number of processes that share the work.
        threads: compute threads of each.
        microbatches: where batches are cut.
        train: (folder for runs, name) -> one training run, in fresh processes; blocks until it is over.
    """

    engine: str
    mode: str
    stages: int
    threads: int
    microbatches: int | None = None
    train: Callable[[Path, str], Outcome]


Source = Callable[[], Recipe]
Prepare = Callable[[Source, Resolved, Path], Contender]


def _outcome(done: SingleRun | PeerRun, resolved: Resolved) -> Outcome:
    rate = done.batches * resolved.batch_shape[0] / done.seconds
    peaks = done.peak_memory_bytes if isinstance(done, PeerRun) else (done.peak_memory_bytes,)
    return Outcome(rate, done.loss, done.accuracy, peaks, reached=done.reached)


def _single(threads: int) -> Prepare:
    def prepare(source: Source, resolved: Resolved, runs: Path) -> Contender:
        def train(runs: Path, name: str) -> Outcome:
            return _outcome(run_single(source, resolved.plan, threads=threads, warmup=resolved.warmup), resolved)

        return Contender(engine="single", mode="backprop", stages=1, threads=threads, train=train)

    return prepare


def _ddp(source: Source, resolved: Resolved, runs: Path) -> Contender:
    ranks, threads = resolved.plan.stages, resolved.plan.threads

    def train(runs: Path, name: str) -> Outcome:
        return _outcome(run_ddp(source, resolved, ranks=ranks, threads=threads, warmup=resolved.warmup), resolved)

    return Contender(engine="ddp", mode="backprop", stages=ranks, threads=threads, train=train)


def _torch(schedule: str) -> Prepare:
    def prepare(source: Source, resolved: Resolved, runs: Path) -> Contender:
        threads = resolved.plan.threads
        parts = best_microbatches(source, resolved, schedule, threads=threads).microbatches

        def train(runs: Path, name: str) -> Outcome:
            done = run_torch_schedule(
                source, resolved, schedule, microbatches=parts, threads=threads, warmup=resolved.warmup
            )
            return _outcome(done, resolved)

        return Contender(
            engine="torch",
            mode=schedule,
            stages=resolved.plan.stages,
            threads=threads,
            microbatches=parts,
            train=train,
        )

    return prepare


def _ours(mode: str) -> Prepare:
    def prepare(source: Source, resolved: Resolved, runs: Path) -> Contender:
        plan = _in_mode(resolved.plan, mode)
        cuts = MODES[mode].cuts_batches
        if cuts and plan.microbatches == 1:
            plan = replace(plan, microbatches=_fastest_cut(source, plan, resolved.batch_shape[0], runs))
        return Contender(
            engine="freewheel",
            mode=mode,
            stages=plan.stages,
            threads=plan.threads,
            microbatches=plan.microbatches if cuts else None,
            train=partial(_train_ours, source, resolve_source(source, plan)),
        )

    return prepare


def _train_ours(source: Source, resolved: Resolved, runs: Path, name: str) -> Outcome:
    result = run(source, resolved, runs, name, Console(quiet=True))
    peaks = tuple(result.finished[k].peak_memory_bytes for k in sorted(result.finished))
    rate = result.samples_per_s or result.steps * resolved.batch_shape[0] / result.seconds
    measured = result.measured if result.steps > 1 else None
    return Outcome(rate, result.loss, result.accuracy, peaks, measured, result.run_dir, result.reached)


def _fastest_cut(source: Source, plan: Plan, rows: int, runs: Path) -> int:
    """The number of microbatches that runs fastest in a short trial."""
    tried: dict[int, float] = {}
    short = replace(plan, steps=_TRIAL_STEPS, evaluate_every=None, until=None)
    for parts in (parts for parts in _MICROBATCHES if rows % parts == 0):
        trial = resolve_source(source, replace(short, microbatches=parts))
        tried[parts] = _train_ours(source, trial, runs, f"{plan.mode}-trial-{parts}").samples_per_s
    if not tried:
        raise PlanError(f"{plan.mode} needs a batch that 2, 4 or 8 divides, not {rows} rows: change --batch.")
    return max(tried, key=tried.__getitem__)


def _in_mode(plan: Plan, mode: str) -> Plan:
    """The same work in another mode; what only concerns the plan's own mode is left out."""
    if mode == plan.mode:
        return plan
    defaults = Plan()
    keep_dni = MODES[mode].gradient == "local"
    return replace(
        plan,
        mode=mode,
        microbatches=plan.microbatches if MODES[mode].cuts_batches else 1,
        targets=defaults.targets,
        mix=defaults.mix,
        true_every=1,
        dni=DNIPlan(hidden=plan.dni.hidden, lr=plan.dni.lr) if keep_dni else DNIPlan(),
        deterministic=False,
        hop_steps=0.0,
    )


ROWS: dict[str, Prepare] = {
    "backprop": _single(1),
    "backprop-all-cores": _single(os.cpu_count() or 1),
    "ddp": _ddp,
    "torch-gpipe": _torch("GPipe"),
    "torch-1f1b": _torch("1F1B"),
    "torch-interleaved-1f1b": _torch("Interleaved1F1B"),
    "torch-interleaved-zero-bubble": _torch("InterleavedZeroBubble"),
    "torch-zbv-zero-bubble": _torch("ZBVZeroBubble"),
    **{mode: _ours(mode) for mode in MODES},
}
"""Rows by name, in the order of the table."""

DEFAULT_ROWS = ("backprop", "naive", "unlocked")
