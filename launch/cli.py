"""The ``freewheel`` command. Exit status: 0 success, 1 a run that failed, 2 wrong use, 130 interrupted."""

from __future__ import annotations

import errno
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import takewhile

from rich.console import Console as RichConsole

from launch.bench.channel import bench_channel, print_rows
from launch.bench.compare import run_bench
from launch.bench.scaling import axis_of, bench_over
from launch.bench.where_rows_run import LOCAL, Site
from launch.on_ray import launcher as ray_launcher
from launch.options.options import Parsed, parse, parse_channel
from launch.options.ray_options import BenchRunOptions, TrainOptions, check_no_launcher
from launch.plots import draw
from launch.ranks import torchrun
from launch.recipes import BUILT_IN
from launch.results.environment import environment
from launch.results.result import SCHEMA
from launch.setup.local_gpus import chosen_here
from launch.setup.rank import Rank
from launch.setup.resolve_source import resolve_source
from launch.show.bounded_exit import leave
from launch.show.closed_pipe import ends_with_its_reader
from launch.show.console import Console, without
from launch.sweep.command import sweep
from launch.training import Launcher, run
from pipeline import Plan, PlanError, nearest
from pipeline.run.resolved import Resolved
from pipeline.user_code import RecipeFailed
from workers.errors import RunFailed
from workers.files import NotWritten, write_json

__all__ = ["run_command"]

_USAGE = f"""usage: freewheel COMMAND RECIPE [options]

  freewheel train RECIPE    train on worker processes of this host
  freewheel bench RECIPE    locked against unlocked, verdict first
  freewheel bench channel   shared memory, gloo, GPU memory: latency and bandwidth of a hop
  freewheel sweep RECIPE    what is learned over modes, delays, DNIs: a grid in the reference driver

  torchrun --nproc-per-node K -m freewheel train RECIPE one stage per rank, on one host or several; bench likewise

RECIPE: {", ".join(BUILT_IN)}, or the path of a Python file.
Options of a command with a recipe: freewheel COMMAND RECIPE --help
"""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run_command(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    with ends_with_its_reader():
        status = _guarded(list(sys.argv[1:] if arguments is None else arguments))
    leave(status)


def _guarded(arguments: list[str]) -> int:
    """Every error becomes one message and a status; no traceback for what the user can mend."""
    rank = Rank.current()
    others = rank is not None and rank.index > 0  # all have the same arguments: one of them speaks for all
    errors = RichConsole(stderr=True, highlight=False, soft_wrap=True, markup=False, quiet=others)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run the way Ctrl-C does, workers first
    try:
        return _command(arguments)
    except PlanError as error:
        for problem in error.problems:
            errors.print(f"freewheel: {problem}")
        if isinstance(error, RecipeFailed) and error.excerpt:
            errors.print(error.excerpt.rstrip())
        if others and rank is not None:
            rank.leave_the_word()
        return 2
    except RunFailed as failure:
        if failure.shown:
            errors.print(failure.shown.rstrip())
        whole = f"; all of it: {failure.report}" if failure.report and failure.details else ""
        errors.print(f"freewheel: {failure}{whole}")
        return 1
    except OSError as error:
        if not (isinstance(error, NotWritten) or error.errno in _NO_ROOM):
            raise
        errors.print(f"freewheel: {error}")
        return 1
    except KeyboardInterrupt:
        errors.print("freewheel: interrupted; all workers were stopped")
        return 130


def _command(arguments: list[str]) -> int:
    if not arguments:
        print(_USAGE, end="", file=sys.stderr)
        return 2
    commands: dict[str, Callable[[str, list[str]], int]] = {"train": _train, "bench": _bench, "sweep": _sweep}
    command, *rest = arguments
    if command in ("-h", "--help") or (command in commands and rest[:1] in (["-h"], ["--help"])):
        print(_USAGE, end="")
        return 0
    if command not in commands:
        raise PlanError(nearest(command, commands, "command"))
    if not rest or rest[0].startswith("-"):
        raise PlanError(f"{command} needs a recipe: {', '.join(BUILT_IN)}, or the path of a .py file.")
    return commands[command](rest[0], rest[1:])


def _train(recipe: str, arguments: list[str]) -> int:
    if (rank := Rank.current()) is not None:
        return torchrun.train_on_ranks(rank, recipe, arguments, _trained)
    parsed = parse(recipe, arguments, TrainOptions, "freewheel train")
    if parsed.run.launcher == "ray":
        return ray_launcher.train_on_ray(recipe, arguments, parsed, _trained)
    return _trained(recipe, arguments, parsed, resolve_source(parsed.source, parsed.plan))


def _trained(
    recipe: str, arguments: list[str], parsed: Parsed, resolved: Resolved, launcher: Launcher | None = None
) -> int:
    """Run it, and show and write what came out."""
    console = Console(quiet=parsed.run.quiet)
    command = ["freewheel", "train", recipe, *arguments]
    try:
        result = run(parsed.source, resolved, parsed.run.runs, parsed.run.name, console, command, launcher)
    except NotWritten as error:
        if error.result is not None:
            console.finished(error.result)
        raise
    console.finished(result)
    console.next_command(*_after_training(recipe, arguments, parsed.plan, resolved.steps, Rank.current()))
    if parsed.run.json is not None:
        write_json(result.as_dict(), parsed.run.json)
    return 0


def _after_training(
    recipe: str, arguments: list[str], plan: Plan, steps: int, rank: Rank | None = None
) -> tuple[str, str]:
    """A benchmark of the same training, without options that are only about this run, or that bench refuses."""
    if_not = {"--evaluate-every": plan.until is not None, "--dni.": plan.unlocked, "--steps": steps > 1}
    left_out = ["--mode", "--name", "--json", "--microbatches", *(name for name, keep in if_not.items() if not keep)]
    arguments = [argument for argument in arguments if argument not in ("--spans", "--no-spans")]
    program = ["freewheel"] if rank is None else rank.program()
    command = shlex.join([*program, "bench", recipe, *without(left_out, arguments)])
    meeting = ", with the options by which the hosts of this run met" if rank is not None and rank.nodes > 1 else ""
    return command, f"how {plan.mode} compares with the other modes here{meeting}"


def _bench(recipe: str, arguments: list[str]) -> int:
    rank = Rank.current()
    if recipe == "channel":
        check_no_launcher(arguments, "bench channel measures a hop on this host: leave it out.")
        if rank is not None:
            raise PlanError("bench channel measures a hop on this host: start it without torchrun.")
        return _bench_channel(arguments)
    if rank is not None:
        return torchrun.bench_on_ranks(rank, recipe, arguments, _benched)
    parsed = parse(recipe, arguments, BenchRunOptions, "freewheel bench")
    if parsed.run.launcher == "ray":
        return ray_launcher.bench_on_ray(recipe, arguments, parsed, _benched)
    return _benched(recipe, arguments, parsed, LOCAL)


def _benched(recipe: str, arguments: list[str], parsed: Parsed, site: Site) -> int:
    """Compare, and show and write what came out."""
    steps = parsed.plan.steps or parsed.source().steps
    if steps < 2:
        raise PlanError(f"steps is {steps}: bench needs at least 2, the first one warms up.")
    console = Console(quiet=parsed.run.quiet)
    command = ["freewheel", "bench", recipe, *arguments]
    measure = bench_over if axis_of(parsed.run) else run_bench
    report = measure(parsed.source, parsed.plan, parsed.run, command, console, site)
    for path in filter(None, (report.folder / "bench.json", parsed.run.json)):
        write_json(report.as_dict(), path)
    draw(report, console)
    if "all" not in parsed.run.rows and not site.hosts:
        console.next_command(shlex.join(_with_all_rows(command)), "every rival in the same table")
    return 0


def _with_all_rows(command: list[str]) -> list[str]:
    """The same command, whatever rows it names replaced by all."""
    start = command.index("--rows") if "--rows" in command else len(command)
    named = takewhile(lambda word: not word.startswith("--"), command[start + 1 :])
    return [*command[:start], *command[start + 1 + len(list(named)) :], "--rows", "all"]


def _sweep(recipe: str, arguments: list[str]) -> int:
    if Rank.current() is not None:
        raise PlanError("sweep runs in one process per core of one host: start it without torchrun.")
    sweep(recipe, arguments)
    return 0


def _bench_channel(arguments: list[str]) -> int:
    options = parse_channel(arguments)
    one, other = chosen_here(Plan(device=options.device)).devices
    rows = bench_channel(rounds=options.rounds, slots=options.slots, devices=(one, other))
    print_rows(rows)
    if options.json is not None:
        command = ["freewheel", "bench", "channel", *arguments]
        content = {"schema": SCHEMA, "command": command, "environment": environment()}
        write_json({**content, "rows": [asdict(row) for row in rows]}, options.json)
    return 0
