"""What a benchmark says about the way to a goal: who was there first, after how many seconds and batches.

A row with 1.5x the throughput that needs 1.2x the batches is there in 1.2 / 1.5 = 0.8x the seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Column, Table

from launch.bench.spread import Spread
from pipeline.plan.goal import Goal, Reached
from pipeline.run.resolved import Resolved

__all__ = ["EXACT", "OTHERS", "PEERS", "UNLOCKED", "Line", "Race", "break_even", "rivals"]

UNLOCKED = "unlocked"
EXACT = "exact locked row"
PEERS = "torch.distributed.pipelining row"
OTHERS = "other mode of ours"


@dataclass(frozen=True)
class Line:
    """One row of a benchmark, as far as the race is concerned. Ratios are taken within a round.

    Attributes:
        kind: UNLOCKED; EXACT or PEERS, of which unlocked is compared with the best; OTHERS, with which it is not; or
            empty: it is compared with this row by itself.
        rates: samples per second of every round.
        reached: when it met the goal in every round; None: not.
    """

    name: str
    kind: str
    rates: Sequence[float]
    reached: Sequence[Reached | None] = ()

    @property
    def found(self) -> list[Reached]:
        """The rounds in which it met the goal."""
        return [one for one in self.reached if one is not None]

    @property
    def always(self) -> bool:
        """Whether it met the goal in every round; only then medians say something, and are there."""
        return bool(self.reached) and len(self.found) == len(self.reached)

    @property
    def seconds(self) -> float | None:
        """Median seconds to the goal."""
        return statistics.median(one.seconds for one in self.found) if self.always else None

    @property
    def updates(self) -> float | None:
        """Median batches to the goal."""
        return statistics.median(one.updates for one in self.found) if self.always else None

    @property
    def rate(self) -> float:
        """Median samples per second."""
        return statistics.median(self.rates)

    def speedup(self, other: Line) -> Spread:
        """Throughput over that of another row."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True)])

    def over(self, other: Line) -> tuple[Spread, Spread]:
        """(seconds, batches) to the goal over those of another row; both met it in every round."""
        pairs = list(zip(self.found, other.found, strict=True))
        seconds = Spread.of([mine.seconds / theirs.seconds for mine, theirs in pairs])
        return seconds, Spread.of([mine.updates / theirs.updates for mine, theirs in pairs])


def rivals(lines: Sequence[Line], merit: Callable[[Line], float]) -> list[tuple[Line, str]]:
    """Whom unlocked is compared with, and how to call them: of each kind that of most merit, and the others by name."""
    chosen: list[tuple[Line, str]] = []
    for kind in (EXACT, PEERS):
        ranked = sorted((line for line in lines if line.kind == kind), key=merit)
        chosen += [(line, f"the best {kind} ({line.name})") for line in ranked[-1:]]
    return chosen + [(line, line.name) for line in lines if not line.kind]


def break_even(lines: Sequence[Line]) -> str:
    """How many more batches unlocking may need than the best exact row before its speed is used up; or nothing."""
    unlocked = next((line for line in lines if line.kind == UNLOCKED), None)
    exact = max((line for line in lines if line.kind == EXACT), key=lambda line: line.rate, default=None)
    if unlocked is None or exact is None:
        return ""
    ratio = unlocked.speedup(exact).median
    if ratio < 1:
        return f"Unlocking would have to get by with {ratio:.2f}x the batches of {exact.name} to be worth it."
    return f"Unlocking may need up to {ratio:.2f}x the batches of {exact.name} before its gain is gone."


@dataclass(frozen=True)
class Race:
    """The way of all rows to one goal of the held-out data; ratios in the table are over the first row."""

    goal: Goal
    resolved: Resolved
    lines: Sequence[Line]

    def verdict(self) -> str:
        """Who was first, and what unlocking did to the seconds and to the batches; losses are said like gains."""
        there = [line for line in self.lines if line.always]
        steps = f"{self.resolved.steps:,} batches"
        if not there:
            return f"To {self.goal}: no row reached it in every round within {steps}.{self._partly()}"
        first = min(there, key=lambda line: line.seconds or 0.0)
        text = f"To {self.goal}: {first.name} was first, after {first.seconds:.2f} s and {first.updates:,.0f} batches."
        unlocked = next((line for line in self.lines if line.kind == UNLOCKED), None)
        if unlocked is not None and unlocked.always:
            text += self._of_unlocked(unlocked, there)
        if missing := [line.name for line in self.lines if not line.found]:
            text += f" Never within {steps}: {', '.join(missing)}."
        return text + self._partly()

    def table(self) -> Table:
        """One line per row."""
        yardstick = self.lines[0]
        title = f"to {self.goal}, in batches of {self.resolved.step_rows}; x: over {yardstick.name}"
        names = ("reached", "seconds", "x seconds", "batches", "x batches")
        columns = Column("mode", no_wrap=True), *(Column(name, justify="right", no_wrap=True) for name in names)
        table = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for line in self.lines:
            share = f"{len(line.found)} of {len(line.reached)}"
            if line.seconds is None or line.updates is None:
                table.add_row(line.name, share, *"----")
                continue
            seconds = Spread.of([one.seconds for one in line.found]).brief()
            ratios = [f"{ratio.median:.2f}" for ratio in line.over(yardstick)] if yardstick.always else "--"
            table.add_row(line.name, share, seconds, ratios[0], f"{line.updates:,.0f}", ratios[1])
        return table

    def note(self) -> str:
        """What the seconds contain."""
        every, passes = self.resolved.plan.evaluate_every, self.resolved.held_out_batches
        looks = f"looks at the held-out data ({passes:,} batches, after every {every:,} of training)"
        return f"Every row pays on its clock for its {looks}; seconds count from the first batch on."

    def _of_unlocked(self, unlocked: Line, there: Sequence[Line]) -> str:
        parts, later = list[str](), list[str]()
        for line, called in rivals(there, lambda line: -(line.seconds or 0.0)):
            seconds, batches = unlocked.over(line)
            parts.append(f"{seconds.times()} the seconds and {batches.median:.2f}x the batches of {called}")
            later += [line.name] if seconds.median > 1 else []
        needed = f" Unlocked needed {', '.join(parts)}." if parts else ""
        return needed + (f" Unlocking comes later here than {', '.join(later)}." if later else "")

    def _partly(self) -> str:
        some = [line for line in self.lines if line.found and not line.always]
        return "".join(f" {line.name} reached it in {len(line.found)} of {len(line.reached)} rounds." for line in some)
