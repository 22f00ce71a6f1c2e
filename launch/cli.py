"""The ``freewheel`` command. Exit status: 0 success, 1 a run that failed, 2 wrong use, 130 interrupted."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from rich.console import Console as RichConsole

from launch.bench import bench, environment
from launch.bench_channel import bench_channel, print_rows
from launch.console import Console
from launch.options import BenchOptions, Parsed, RunOptions, parse, parse_channel
from launch.recipes import BUILT_IN
from launch.result import SCHEMA
from launch.training import resolve_source, run
from pipeline import PlanError, nearest
from workers.failures import RunFailed

__all__ = ["main"]

_USAGE = f"""usage: freewheel COMMAND RECIPE [options]

  freewheel train RECIPE    train on worker processes of this host
  freewheel bench RECIPE    locked against unlocked, verdict first
  freewheel bench channel   the shared memory channel: latency and bandwidth

RECIPE: {", ".join(BUILT_IN)}, or the path of a Python file.
Options of a command with a recipe: freewheel COMMAND RECIPE --help
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(_guarded(list(sys.argv[1:] if arguments is None else arguments)))


def _guarded(arguments: list[str]) -> int:
    """Every error becomes one message and a status; no traceback for what the user can mend."""
    errors = RichConsole(stderr=True, highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _command(arguments)
    except PlanError as error:
        for problem in error.problems:
            errors.print(f"freewheel: {problem}", markup=False)
        return 2
    except RunFailed as failure:
        if failure.details:
            errors.print(failure.details.rstrip(), markup=False)
        errors.print(f"freewheel: {failure}", markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print("freewheel: interrupted; all workers were stopped", markup=False)
        return 130


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run the way Ctrl-C does, workers first."""
    raise KeyboardInterrupt


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    commands: dict[str, Callable[[str, list[str]], int]] = {"train": _train, "bench": _bench}
    command, *rest = arguments
    if command not in commands:
        raise PlanError(nearest(command, commands, "command"))
    if not rest or rest[0].startswith("-"):
        if rest and rest[0] in ("-h", "--help"):
            print(_USAGE, end="")
            return 0
        raise PlanError(f"{command} needs a recipe: {', '.join(BUILT_IN)}, or the path of a .py file.")
    return commands[command](rest[0], rest[1:])


def _train(recipe: str, arguments: list[str]) -> int:
    parsed = parse(recipe, arguments, RunOptions, "freewheel train")
    console = Console(quiet=parsed.run.quiet)
    resolved = resolve_source(parsed.source, parsed.plan)
    result = run(parsed.source, resolved, parsed.run.runs, parsed.run.name, console)
    console.finished(result)
    console.next_command(*_after_training(recipe, arguments, parsed))
    if parsed.run.json is not None:
        parsed.run.json.write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    return 0


def _after_training(recipe: str, arguments: list[str], parsed: Parsed) -> tuple[str, str]:
    kept = [
        a for i, a in enumerate(arguments) if not ({a, arguments[i - 1] if i else ""} & {"--mode", "--name", "--json"})
    ]
    command = shlex.join(["freewheel", "bench", recipe, *kept])
    return command, f"how {parsed.plan.mode} compares with the other modes here"


def _bench(recipe: str, arguments: list[str]) -> int:
    if recipe == "channel":
        return _bench_channel(arguments)
    parsed = parse(recipe, arguments, BenchOptions, "freewheel bench")
    plan = dataclasses.replace(parsed.plan, mode="unlocked")
    console = Console(quiet=parsed.run.quiet)
    report = bench(parsed.source, plan, parsed.run, ["freewheel", "bench", recipe, *arguments], console)
    if parsed.run.json is not None:
        parsed.run.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    return 0


def _bench_channel(arguments: list[str]) -> int:
    options = parse_channel(arguments)
    rows = bench_channel(rounds=options.rounds, slots=options.slots)
    print_rows(rows)
    if options.json is not None:
        content = {
            "schema": SCHEMA,
            "command": ["freewheel", "bench", "channel", *arguments],
            "environment": environment(),
            "rows": [row.to_dict() for row in rows],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0
