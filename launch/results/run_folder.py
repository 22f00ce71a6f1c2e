"""The folder of a run: its name, its plan, its metrics, its weights."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from pipeline import PlanError
from pipeline.metrics.spans import Spans
from pipeline.run.resolved import Resolved
from pipeline.wording import escaped
from workers.files import write_json, write_tensors, writing

__all__ = ["default_name", "join_parts", "metrics", "name_problems", "new_run_dir", "read_spans", "write_plan"]

_NAME_BYTES = 240  # of 255, as a number may be added
_NO_TEXT = "no weights can be saved under a path that is no valid UTF-8"


def new_run_dir(runs: Path, name: str) -> Path:
    """Make ``runs/<name>``, or ``runs/<name>-2`` ... when that exists, or raise PlanError."""
    if problems := list(name_problems(name)):
        raise PlanError(*problems)
    if escaped(str(runs.resolve())) != str(runs.resolve()):
        raise PlanError(f"the runs are to lie in {runs.resolve()}: {_NO_TEXT}; choose another folder with --runs.")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 10_000):
            path = runs / (name if attempt == 1 else f"{name}-{attempt}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        why = f"cannot make a folder for the run in {runs}: {error.strerror}; choose another with --runs."
        raise PlanError(why) from error
    raise PlanError(f"{runs} is full of runs called {name}: choose another name with --name.")


def name_problems(name: str) -> Iterator[str]:
    """Why a run cannot be called this: its folder lies in the folder of the runs, nowhere else."""
    if not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        yield f"name is {name!r}: it names a folder inside the folder of the runs; give a word without / and \\."
    elif (size := len(os.fsencode(escaped(name)))) > _NAME_BYTES:
        yield f"name has {size:,} bytes: it names a folder, so give at most {_NAME_BYTES}."
    elif escaped(name) != name:
        yield f"name is {name!r}: {_NO_TEXT}; give a name in UTF-8."


def default_name(recipe: str, plan_mode: str) -> str:
    """Time and what is run, e.g. ``2027-01-05T10-02-33-digits-unlocked``; a recipe's name may hold anything."""
    fit_for_a_folder = re.sub(r"[^\w.+=-]+", "-", recipe)[:40]
    return f"{time.strftime('%Y-%m-%dT%H-%M-%S')}-{fit_for_a_folder}-{plan_mode}"


def write_plan(run_dir: Path, recipe: str, resolved: Resolved, command: Iterable[str], launcher: str) -> None:
    """Write plan.json: the resolved plan and what was decided, with reasons."""
    cuts = len(resolved.cuts)
    content = {
        "recipe": recipe,
        "launcher": launcher,
        "command": list(command),
        "plan": resolved.plan.as_dict(),
        "layers": list(resolved.layer_names),
        "layer_parameters": list(resolved.layer_parameters),
        "layer_seconds": list(resolved.layer_seconds) if resolved.layer_seconds else None,
        "channels": [
            {"cut": index % cuts, "replica": index // cuts, "kind": choice.kind, "why": choice.why}
            for index, choice in enumerate(resolved.channels)
        ],
        "decided": [{"what": what, "value": value, "why": why} for what, value, why in resolved.reasons],
    }
    write_json(content, run_dir / "plan.json", default=str)


@contextlib.contextmanager
def metrics(run_dir: Path) -> Iterator[Callable[..., None]]:
    """Gives ``write(event, **values)`` of metrics.jsonl, flushed line by line so that it can be followed.

    Opening, writing and closing may raise NotWritten, the latter unless there is another error already.
    """
    path = run_dir / "metrics.jsonl"
    with writing(path):
        file = path.open("w", buffering=1)

    def write(event: str, **values: Any) -> None:
        with writing(path):
            file.write(json.dumps(escaped({"event": event, **values})) + "\n")

    try:
        yield write
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    with writing(path):
        file.close()


def read_spans(run_dir: Path, replicas: int = 1) -> list[Spans]:
    """What every worker of a finished run did when, one entry per stage, those of replica 0 first."""
    stages = len(list((run_dir / "spans").glob("stage-*.npy")))
    if not stages:
        raise FileNotFoundError(f"no spans of any stage in {run_dir / 'spans'}: is it the folder of a finished run?")
    starts = ["", *(f"replica-{replica}-" for replica in range(1, replicas))]
    names = [f"{start}stage-{k}.npy" for start in starts for k in range(stages)]
    return [Spans(np.load(run_dir / "spans" / name, allow_pickle=False)) for name in names]


def join_parts(run_dir: Path, stages: int) -> None:
    """Join the workers' parts into model.safetensors and optimizer.safetensors."""
    parts = run_dir / "parts"
    for what in ("model", "optimizer"):
        paths = [parts / f"{what}-{k}.safetensors" for k in range(stages)]
        tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
        write_tensors(tensors, run_dir / f"{what}.safetensors")
        for path in paths:
            path.unlink()
    parts.rmdir()
