"""The options of ``freewheel sweep`` besides those of the plan and of the recipe, and ready-made sets."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import tyro

from launch.options.options import RunOptions, count_problems
from pipeline import PlanError, nearest

__all__ = ["PRESETS", "SweepOptions", "seeds_of", "with_preset"]

_MOST_S = 10**6


@dataclass(frozen=True, kw_only=True)
class SweepOptions(RunOptions):
    """What to vary, and how to run it."""

    fixed: ClassVar[dict[str, Any]] = {
        "seed": 0,
        "balance": "layers",  # the reference driver has no clock to measure layers with
        "channels": "auto",
        "deterministic": False,
        "threads": 1,
        "spans": True,
        "emulate": None,
        "link": None,
        "stall_after_s": 60.0,
    }

    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE,VALUE,...: an option of the plan or of the recipe and its values, e.g. hop-steps=0,1,4; NAME,NAME=...
    gives several options the same value. Repeatable: all combinations are run."""
    row: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """'NAME: OPTIONS': options that belong together, under one name, e.g. 'cDNI: --dni.form linear'. Repeatable: every
    row is run with every combination."""
    seeds: str = "0,1,2"
    """Seeds, with commas; everything is run with each of them."""
    preset: str | None = None
    """A ready-made sweep: stages, hops, rivals, paper, dni-size or batch-norm; what is given besides comes on top."""
    jobs: int | None = None
    """Runs at a time, one process with one thread each; default: as many as there are cores."""
    metric: Literal["error", "loss"] | None = None
    """What to compare: held-out error or held-out loss; default: the error where every sample has one answer."""
    within_s: float = 7200.0
    """Seconds that a run may take; after that it is ended."""

    @property
    def num_jobs(self) -> int:
        """Runs at a time."""
        return self.jobs or len(os.sched_getaffinity(0))

    def problems(self) -> Iterator[str]:
        """What cannot work, one sentence each."""
        yield from super().problems()
        if self.jobs is not None:
            yield from count_problems(jobs=self.jobs)
        if not 0 < self.within_s <= _MOST_S:
            yield f"within_s is {self.within_s}: it must be a positive number of at most {_MOST_S:,}."
        if seeds_of(self.seeds) is None:
            yield f"seeds is {self.seeds!r}: give different whole numbers, at least 0, with commas, e.g. 0,1,2."


def seeds_of(text: str) -> tuple[int, ...] | None:
    """The seeds of ``0,1,2``; None: they are none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        return None
    seeds = tuple(map(int, parts))
    return seeds if len(set(seeds)) == len(seeds) else None


PRESETS: dict[str, str] = {
    "stages": "--vary stages=1,2,3,6 --hop-steps 1",
    "hops": "--vary hop-steps=0,1,8 --stages 6 --row 'backpropagation: --mode naive' --row 'unlocked:' "
    "--row 'async-1f1b, waiting: --mode async-1f1b' "
    "--row 'async-1f1b, kept full: --mode async-1f1b --in-flight full'",
    "rivals": "--stages 6 --hop-steps 1 --row 'backpropagation: --mode naive' --row 'unlocked:' "
    "--row 'async-1f1b: --mode async-1f1b' --row 'async-1f1b, warm-up: --mode async-1f1b --optimizer.warmup-steps 200' "
    "--row 'async-1f1b-nadamw: --mode async-1f1b --optimizer.rule nadamw --optimizer.warmup-steps 200' "
    "--row 'backpropagation, nadamw: --mode naive --optimizer.rule nadamw --optimizer.warmup-steps 200' "
    "--row 'unlocked after 200 batches: --warmup-steps 200' --row 'unlocked, auto: --unlock auto'",
    "paper": "--vary layers,stages=3,4,5,6 --row 'backpropagation: --mode naive' "
    "--row 'DNI: --dni.form linear --dni.no-labels' --row 'cDNI: --dni.form linear' "
    "--row 'cDNI, true targets: --dni.form linear --targets true' "
    "--row 'cDNI, p = 0.2: --dni.form linear --update-probability 0.2' "
    "--row 'loss_model: --dni.form loss_model' "
    "--row 'loss_model, p = 0.2: --dni.form loss_model --update-probability 0.2' "
    "--row 'label_residual: --dni.form label_residual' "
    "--row 'label_residual, p = 0.2: --dni.form label_residual --update-probability 0.2'",
    "dni-size": "--vary dni.hidden=16,64,256,1024 --stages 6 --hop-steps 1 --row 'backpropagation: --mode naive' "
    "--row 'mlp: --dni.form mlp' --row 'loss_model: --dni.form loss_model'",
    "batch-norm": "--vary batch-norm=true,false --stages 6 --hop-steps 1 --row 'backpropagation: --mode naive' "
    "--row 'bootstrap:' --row 'true: --targets true'",
}


def with_preset(arguments: Sequence[str]) -> list[str]:
    """The arguments with those of ``--preset`` in front of them; PlanError: no such preset."""
    for index, argument in enumerate(arguments):
        option, equals, name = argument.partition("=")
        if option == "--preset":
            name = name if equals else next(iter(arguments[index + 1 :]), "")
            if name not in PRESETS:
                raise PlanError(nearest(name, PRESETS, "preset"))
            return [*shlex.split(PRESETS[name]), *arguments]
    return list(arguments)
