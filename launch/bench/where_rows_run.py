"""Where the rows of a benchmark run: on this host, or over the ranks that a launcher has started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launch.bench.rivals import HERE, Places
from launch.setup.resolve_source import resolve_source
from launch.training import Launcher
from pipeline import Plan, Recipe
from pipeline.run.resolved import Resolved

__all__ = ["LOCAL", "Site"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Everything a row needs to know of the place it runs at; by default this host.

    Attributes:
        launcher: who starts the workers of our own rows; None: this process.
        resolve: (source, plan) -> the plan without open questions, knowing who shares a host with whom.
        agree: makes sure that every host sees the same recipe and plan.
        look: called twice a second while only this host works; raises what ends the benchmark.
        hosts: name of the host of every rank; empty: all are children of this process.
    """

    launcher: Launcher | None = None
    places: Places = HERE
    resolve: Callable[[Callable[[], Recipe], Plan], Resolved] = resolve_source
    agree: Callable[[Resolved], None] = lambda resolved: None
    look: Callable[[], None] = lambda: None
    hosts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the launcher, as bench.json has it."""
        return self.launcher.name if self.launcher is not None else "local"


LOCAL = Site()
