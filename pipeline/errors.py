"""What can go wrong, as types: a plan that cannot run, and a stage that failed while running."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self

__all__ = ["NoEffect", "PlanError", "StageError", "nearest"]


class NoEffect(str):
    """A problem of a plan: an option is given that nothing in the run would read.

    Args:
        option: its name in the plan, e.g. ``dni.hidden``; ``dni`` stands for all below it.
        why: the rest of the sentence, with the remedy: ``with mode naive: leave it out, or choose mode unlocked.``
    """

    option: str

    def __new__(cls, option: str, why: str) -> Self:
        """The sentence, which remembers the option."""
        self = super().__new__(cls, f"{option} has no effect {why}")
        self.option = option
        return self


class PlanError(ValueError):
    """The user asked for something that cannot run; found before any process starts.

    Args:
        problems: one sentence per mistake, each with its remedy. All mistakes of a plan come at once.

    Attributes:
        problems: as given, plain strings: they travel between processes.
        idle: the same problems where each is that an option has no effect; empty where there is more trouble.
    """

    def __init__(self, *problems: str) -> None:
        idle = tuple(problem for problem in problems if isinstance(problem, NoEffect))
        self.problems = tuple(map(str, problems))
        self.idle = idle if len(idle) == len(problems) else ()
        super().__init__("\n".join(problems))


class StageError(RuntimeError):
    """Work on one batch failed inside a stage. The original exception is its ``__cause__``.

    Args:
        message: what happened.
        stage: index of the stage.
        layer: the layer's name in the unsplit model, or None when no layer was running.
        batch: id of the batch, or None when no batch was in work.
    """

    def __init__(self, message: str, *, stage: int, layer: str | None = None, batch: int | None = None) -> None:
        self.stage, self.layer, self.batch = stage, layer, batch
        where = f"stage {stage}"
        if layer is not None:
            where += f", layer {layer}"
        if batch is not None:
            where += f", batch {batch}"
        super().__init__(f"{where}: {message}")


def nearest(wrong: str, valid: Iterable[str], what: str) -> str:
    """One sentence for an unknown name: what came, the nearest valid name, and all valid names."""
    names = list(valid)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    guess = f"; did you mean '{close[0]}'?" if close else ";"
    return f"unknown {what} '{wrong}'{guess} Valid: {', '.join(names)}."
