"""The cost ledger: what a sample costs in every mode, in seconds and in operations: more work, or less waiting?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from launch.show.tables import print_table
from pipeline.metrics.measurements import Measured
from pipeline.run.flops import StageFlops

__all__ = ["Account", "Work", "entry", "same_work", "seconds_of", "show_ledger"]

_TITLE = "where the work went, per sample, all processes together"
_LEGEND = "us: microseconds; Mflop: 10^6 operations in products, convolutions, attention"
_SHORT = {"backward": "back+step", "dni": "DNI", "communication": "comm", "waiting": "wait"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one sample costs, summed over all processes, by what it is spent on; one unit, seconds or operations."""

    forward: float = 0.0
    backward: float = 0.0
    dni: float = 0.0
    relay: float = 0.0
    communication: float = 0.0
    waiting: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return math.fsum(asdict(self).values())

    @classmethod
    def of_flops(cls, stages: Sequence[StageFlops], batch_rows: int) -> Work:
        """Operations per sample, summed over the stages; sending and waiting are none."""
        names = [f.name for f in fields(StageFlops)]
        return cls(**{name: sum(getattr(stage, name) for stage in stages) / batch_rows for name in names})


_KINDS = tuple(kind.name for kind in fields(Work))


@dataclass(frozen=True, kw_only=True)
class Account:
    """One row of the ledger.

    Attributes:
        seconds: per sample; None where nobody knows.
        flop: floating-point operations per sample; None where nothing was counted.
        total_s: seconds per sample of all its processes together, known of every row.
        note: why operations could not be counted.
    """

    name: str
    seconds: Work | None
    flop: Work | None
    total_s: float
    note: str | None = None


def seconds_of(measured: Measured, batch_rows: int) -> Work:
    """Seconds per sample, summed over the stages; loading and evaluation are ``other``."""
    per_share = measured.seconds / (measured.batches * batch_rows)
    shares = {name: sum(stage.shares[name] for stage in measured.stages) for name in measured.stages[0].shares}
    shares["other"] += shares.pop("load") + shares.pop("evaluate")
    return Work(**{name: share * per_share for name, share in shares.items()})


def entry(seconds: Work | None, flop: Work | None) -> dict[str, float | None] | None:
    """``ledger`` of a row of bench.json: ``forward_s`` ... ``waiting_s``, ``forward_flop`` ... ``waiting_flop``."""
    if seconds is None and flop is None:
        return None
    units = (("s", seconds), ("flop", flop))
    return {f"{name}_{unit}": getattr(work, name, None) for unit, work in units for name in _KINDS if name != "other"}


def show_ledger(
    console: Console, rows: Sequence[Account], unlocked: Account | None, alone: Account | None, locked: Account | None
) -> None:
    """Print the ledger and what follows from it."""
    console.print()
    print_table(console, _table(rows))
    console.print(f"[dim]{_LEGEND}[/dim]")
    for row in rows:
        if row.note is not None:
            console.print(f"  not counted: {row.name}  [dim]({escape(row.note)})[/dim]")
    if unlocked is not None and (sentence := same_work(unlocked, alone, locked)) is not None:
        console.print(f"\n{sentence}")


def same_work(unlocked: Account, alone: Account | None, locked: Account | None) -> str | None:
    """Whether unlocked training does the same operations as one process, and waits less than the best locked row.

    A sentence or two; None when there is nothing to compare with.
    """
    parts = []
    if alone is not None and alone.flop is not None and unlocked.flop is not None and alone.flop.total > 0:
        parts.append(_more_work(unlocked.flop, alone.flop, alone.name))
        if unlocked.seconds is not None:
            share = unlocked.seconds.dni / unlocked.seconds.total
            parts.append(f"In seconds the DNI is {share:.1%} of what it spends.")
    if locked is not None and locked.seconds is not None and unlocked.seconds is not None:
        parts.append(_less_waiting(unlocked.seconds, locked.seconds, locked.name))
    return "The same work, only moved in time? " + " ".join(parts) if parts else None


def _table(accounts: Sequence[Account]) -> Table:
    """Two lines per row: microseconds, and millions of operations."""
    names = (*(_SHORT.get(kind, kind) for kind in _KINDS), "total")
    columns = [Column("mode", overflow="fold"), Column("", no_wrap=True)]
    columns += [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(*columns, title=_TITLE, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for account in accounts:
        table.add_row(account.name, "us", *_cells(account.seconds, 1e6), _figure(account.total_s * 1e6))
        if account.flop is not None:
            table.add_row("", "Mflop", *_cells(account.flop, 1e-6), _figure(account.flop.total * 1e-6))
    return table


def _more_work(mine: Work, theirs: Work, name: str) -> str:
    """By what the two differ: a cut may also save the input gradient that one process computes."""
    forward, inputs = mine.forward - theirs.forward, mine.backward - theirs.backward
    part = {"DNI": mine.dni, "relay": mine.relay, "forward": forward, "input gradients": inputs}
    differs = {what: flop / theirs.total for what, flop in part.items() if abs(flop) > 1e-9 * theirs.total}
    if not differs:
        return f"Unlocked does as much as {name}."
    listed, more = ", ".join(f"{what} {share:+.1%}" for what, share in differs.items()), mine.total / theirs.total - 1
    return f"Unlocked does {abs(more):.1%} {'more' if more >= 0 else 'less'} operations than {name} ({listed})."


def _less_waiting(mine: Work, theirs: Work, name: str) -> str:
    way = "falls" if mine.waiting < theirs.waiting else "does not fall"
    return (
        f"Waiting {way}: from {_figure(theirs.waiting * 1e6)} us a sample ({theirs.waiting / theirs.total:.0%} of the "
        f"workers' time, {name}) to {_figure(mine.waiting * 1e6)} us ({mine.waiting / mine.total:.0%})."
    )


def _cells(work: Work | None, scale: float) -> list[str]:
    return [_figure(getattr(work, name) * scale) if work is not None else "-" for name in _KINDS]


def _figure(value: float) -> str:
    """Three digits, none behind the point where there are more before it."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}" if abs(value) >= 0.01 else "<0.01"
