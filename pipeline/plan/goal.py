"""When a run may end before its last batch: the held-out data shows what was asked for.

until accuracy=0.98    at least 98 % of the held-out answers are right
until loss=1.9         the held-out loss is at most 1.9
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from pipeline.errors import PlanError, nearest

__all__ = ["Goal", "Reached", "look_every"]

_EXAMPLES = {"accuracy": "accuracy=0.98", "loss": "loss=1.9"}


@dataclass(frozen=True)
class Goal:
    """What the held-out data has to show: an ``accuracy``, in (0, 1], or more; or a ``loss``, above 0, or less."""

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str, option: str) -> Self:
        """Read ``accuracy=0.98`` or ``loss=1.9``, or raise PlanError."""
        metric, _, number = str(text).partition("=")
        if metric not in _EXAMPLES:
            raise PlanError(nearest(metric, _EXAMPLES, f"metric in {option}"))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if metric == "accuracy" and not 0 < value <= 1:
            raise PlanError(f"{option} {text}: give the share of right answers, in (0, 1], as in {_EXAMPLES[metric]}.")
        if not 0 < value < math.inf:
            raise PlanError(f"{option} {text}: give a number above 0, as in {_EXAMPLES[metric]}.")
        return cls(metric, value)

    def met(self, loss: float, accuracy: float | None) -> bool:
        """Whether the mean loss and the share of right answers are good enough; a loss that is not a number is not."""
        if self.metric == "loss":
            return loss <= self.value
        return accuracy is not None and accuracy >= self.value

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"


@dataclass(frozen=True)
class Reached:
    """The first pass over the held-out batches that met the goal: training batches before it, seconds from the first
    batch to its end, warm-up and all evaluations included, mean loss and share of right answers.
    """

    updates: int
    seconds: float
    loss: float
    accuracy: float | None


def look_every(steps: int) -> int:
    """After how many batches to look when nobody says: 40 times in a run of ``steps``, but at least 10 apart."""
    return max(min(10, steps), steps // 40)
