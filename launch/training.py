"""``train``: from a recipe and a plan to a result. The command line does the same."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from launch.results import run_folder
from launch.results.result import Result
from launch.setup.matching import Matching
from launch.setup.rank import Rank
from launch.setup.recipe_source import GivenRecipe, being_loaded
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from pipeline import Plan, PlanError, Recipe
from pipeline.plan.replica_layout import worker_of
from pipeline.run.resolved import Resolved
from workers.channels.names import Names
from workers.channels.shm.ring import new_prefix
from workers.errors import RunFailed
from workers.files import NotWritten, write_json, write_text
from workers.processes.interrupts import Interrupts
from workers.supervision.local_workers import LocalWorkers
from workers.telemetry import records
from workers.wiring.edges import rendezvous
from workers.wiring.run_memory import shared_memory
from workers.worker.assignment import Assignment

__all__ = ["Launcher", "Working", "run", "train", "without_loss"]

Working = tuple[Iterator[records.Record], Callable[[], None]]
"""Workers at work: what they report, and how to ask them to take no further batch."""


@dataclass(frozen=True)
class Launcher:
    """Who starts the workers: its name in the run's files; (source, resolved, run folder) -> workers, ended on exit."""

    name: str
    working: Callable[[Callable[[], Recipe], Resolved, Path], contextlib.AbstractContextManager[Working]]


def train(
    *,
    model: Callable[[], nn.Module],
    batches: Callable[[int], Any] | Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    plan: Plan,
    evaluation: Callable[[], Iterable[Any]] | Iterable[Any] | None = None,
    correct: Callable[[Any, Any], tuple[Tensor, int]] | None = None,
    name: str = "train",
    runs: str | Path = "runs",
    quiet: bool = False,
) -> Result:
    """Train a network as a pipeline of processes on this host.

    The workers get the functions with the values that these read at the time of the call: those of the program itself
    (lambdas, inner functions, a notebook's) are copied, those of other modules are imported by name. What a worker
    builds from them is compared with what this process builds, and a difference is refused.

    Args:
        model: builds the whole network: any module, or a list of modules. Where its layers are no chain, every stage
            runs a part of its own forward (``Plan.split``).
        batches: batch i as a function of i, a list of batches, or a ``DataLoader``. A batch is (inputs, labels), a dict
            of the model's arguments, or the inputs alone; all are of one shape.
        loss: (what the model gives, labels) -> mean over the rows. The labels of a dict are the dict, those of inputs
            alone the inputs.
        plan: how to run; ``plan.steps`` must be given.
        evaluation: the held-out batches, in a fixed order, or a function that gives them.
        correct: counts right answers, e.g. ``freewheel.correct_predictions``.
        name: name of the run, whose files lie in ``runs/<name>``.
        quiet: print nothing.

    Raises:
        PlanError: something cannot run, or a worker builds something else; nothing was trained.
        RunFailed: a worker failed; everything was stopped and cleaned up.
        NotWritten: as on a full disk; where the training was over by then, its ``result`` is there all the same.

    Blocks:
        until the training is over. A run without progress ends after ``plan.stall_after_s``.
    """
    if being_loaded():
        module = sys._getframe(1).f_globals.get("__name__")
        raise PlanError(
            f"train() is called whenever the module {module} is imported, and every worker imports it: put the call "
            'into a function, or under if __name__ == "__main__":'
        )
    if Rank.current() is not None:
        raise PlanError("train() is not there under torchrun yet: use the command, torchrun ... -m freewheel train.")
    if plan.steps is None:
        raise PlanError("steps is not given: say how many batches to train on, Plan(steps=...).")
    if problems := list(run_folder.name_problems(name)):
        raise PlanError(*problems)
    recipe = Recipe(name=name, model=model, batches=batches, loss=loss, evaluation=evaluation, correct=correct)
    source = GivenRecipe(recipe)
    return run(source, resolve_source(source, plan), Path(runs), name, Console(quiet=quiet))


def run(
    source: Callable[[], Recipe],
    resolved: Resolved,
    runs: Path,
    name: str | None,
    console: Console,
    command: Sequence[str] | None = None,
    launcher: Launcher | None = None,
) -> Result:
    """Run a resolved plan and write its folder ``runs/<name>``.

    Args:
        name: None: time, recipe and mode.
        command: for plan.json; None: this program's own arguments.
        launcher: None: this process, on this host.

    Raises:
        PlanError: the folder of the run cannot be made.
        RunFailed: a worker failed; its traceback or the stall report lies in ``failure.txt`` of the run.
        NotWritten: a file of the run cannot be written. Where the training was over, the error carries the result.
    """
    recipe = source()
    name = run_folder.default_name(recipe.name, resolved.plan.mode) if name is None else name
    run_dir = run_folder.new_run_dir(runs, name).resolve()
    launcher = launcher or Launcher("local", _local)
    run_folder.write_plan(run_dir, recipe.name, resolved, sys.argv if command is None else command, launcher.name)
    console.decided(recipe.name, resolved, run_dir)
    result = Result(resolved, run_dir, launcher=launcher.name)
    try:
        with launcher.working(source, resolved, run_dir) as working, console.progress_line("starting", resolved.steps):
            _follow(*working, result, console)
    except RunFailed as failure:
        try:
            write_text(f"{failure}\n\n{failure.details}\n", run_dir / "failure.txt")
            failure.report = run_dir / "failure.txt"
        except NotWritten as error:
            failure.shown = f"{failure.details.rstrip()}\n({error})".lstrip()
        raise
    try:
        run_folder.join_parts(run_dir, resolved.plan.stages)
        write_json(result.as_dict(), run_dir / "result.json")
    except NotWritten as error:
        error.result = result
        raise
    return result


@contextlib.contextmanager
def _local(source: Callable[[], Recipe], resolved: Resolved, run_dir: Path) -> Iterator[Working]:
    """Workers on this host, children of this process."""
    names, bare = Names(new_prefix()), without_loss(resolved)
    with Interrupts() as interrupts, shared_memory(resolved, names), rendezvous(resolved) as meeting:
        assignments = [
            Assignment(k, bare, source, names, run_dir, meeting, replica=replica)
            for replica in range(resolved.plan.replicas)
            for k in range(resolved.plan.stages)
        ]
        with LocalWorkers(assignments, interrupts.noted) as workers:
            yield workers.run(), workers.end_early


def _follow(
    reported: Iterator[records.Record], end_early: Callable[[], None], result: Result, console: Console
) -> None:
    """Take in what the workers report; end the run once its goal is met. A step's loss is the replicas' mean."""
    goal, matching = result.resolved.plan.goal, Matching(result.resolved)
    rows, replicas = result.resolved.step_rows, result.resolved.plan.replicas
    waiting: list[list[float]] = [[] for _ in range(replicas)]  # losses of steps that not all replicas have made
    with run_folder.metrics(result.run_dir) as write:
        for record in reported:
            if isinstance(record, records.Ready):
                matching.take(record)
                console.ready(record)
            elif isinstance(record, records.Loss):
                waiting[record.replica] += record.losses
                if new := [sum(each) / len(each) for each in zip(*waiting, strict=False)]:
                    waiting = [losses[len(new) :] for losses in waiting]
                    result.losses += new
                    step, mean = result.steps, sum(new) / len(new)
                    write("train", step=step, samples=step * rows, loss=mean, time_ns=record.time_ns)
                    console.progress(step, mean)
            elif isinstance(record, records.Scored):
                result.scores.append(record)
                if goal is not None and result.met is None and goal.met(record.loss, record.accuracy):
                    result.met = record
                    end_early()
                step, found = record.updates, {"loss": record.loss, "accuracy": record.accuracy}
                write("evaluation", step=step, samples=step * rows, **found, time_ns=record.time_ns)
                console.scored(record)
            elif isinstance(record, records.Judged):
                result.judged.append(record)
                write("quality", **msgspec.structs.asdict(record))
            elif isinstance(record, records.Switched):
                result.switches.append(record)
                write("switch", **msgspec.structs.asdict(record))
                console.switched(record)
            elif isinstance(record, records.Finished):
                result.finished[worker_of(result.resolved.plan, record.replica, record.stage)] = record
    ended_ns = max(done.end_ns for done in result.finished.values())
    result.seconds = (ended_ns - result.start_ns) * 1e-9


def without_loss(resolved: Resolved) -> Resolved:
    """As it travels to a worker, whose own recipe gives the loss; what it builds is compared here, not there."""
    return replace(resolved, cuts=tuple(replace(cut, loss=_no_loss) for cut in resolved.cuts), fingerprints=())


def _no_loss(output: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("a cut on its way to a worker carries no loss; the worker's recipe gives it")
