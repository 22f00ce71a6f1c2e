"""What can go wrong, as types: a plan that cannot run, and a stage that failed while running."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self

__all__ = ["NoEffect", "PlanError", "StageError", "nearest"]


class NoEffect(str):
    """A problem of a plan: an option is given that nothing in the run would read.

    ``option`` is its name in the plan, e.g. ``dni.hidden``; ``dni`` stands for all below it. ``why`` ends the sentence,
    with the remedy: ``with mode naive: leave it out, or choose mode unlocked.``
    """

    option: str

    def __new__(cls, option: str, why: str) -> Self:
        self = super().__new__(cls, f"{option} has no effect {why}")
        self.option = option
        return self


class PlanError(ValueError):
    """The user asked for something that cannot run; found before any process starts.

    ``problems`` has one sentence per mistake, each with its remedy, as plain strings: they travel between processes.
    ``idle`` has the same where each is that an option has no effect; it is empty where there is more trouble.
    """

    def __init__(self, *problems: str) -> None:
        idle = tuple(problem for problem in problems if isinstance(problem, NoEffect))
        self.problems = tuple(map(str, problems))
        self.idle = idle if len(idle) == len(problems) else ()
        super().__init__("\n".join(problems))


class StageError(RuntimeError):
    """Work on one batch failed inside a stage. The original exception is its ``__cause__``.

    ``layer`` is the layer's name in the unsplit model; it and ``batch`` are None when none was running or in work.
    """

    def __init__(self, message: str, *, stage: int, layer: str | None = None, batch: int | None = None) -> None:
        self.stage, self.layer, self.batch = stage, layer, batch
        where = {"stage": stage, "layer": layer, "batch": batch}
        said = ", ".join(f"{what} {value}" for what, value in where.items() if value is not None)
        super().__init__(f"{said}: {message}")


def nearest(wrong: str, valid: Iterable[str], what: str) -> str:
    """One sentence for an unknown name: what came, the nearest valid name, and all valid names."""
    names = list(valid)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    guess = f"; did you mean '{close[0]}'?" if close else ";"
    return f"unknown {what} '{wrong}'{guess} Valid: {', '.join(names)}."
