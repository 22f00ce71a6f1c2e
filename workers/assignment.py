"""What one worker is told at its start, and the names under which it finds everybody else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.plan import Plan
from pipeline.recipe import Recipe
from pipeline.resolve import Resolved
from workers.gloo import Rendezvous
from workers.unnamed import UnnamedFile

__all__ = ["FILES", "Assignment", "Names"]

FILES = {
    "spans": "spans/stage-{}.npy",
    "model": "parts/model-{}.safetensors",
    "optimizer": "parts/optimizer-{}.safetensors",
    "stacks": "stacks-{}.txt",
}
"""What a worker writes, and where in the folder of the run it lies."""


@dataclass(frozen=True)
class Names:
    """Names of everything shared in one run; all begin with the run's prefix."""

    prefix: str

    @property
    def board(self) -> str:
        """The status board."""
        return f"{self.prefix}-s"

    def bell(self, stage: int) -> str:
        """The bell of a worker."""
        return f"{self.prefix}-b{stage}"

    def activations(self, cut: int) -> str:
        """The channel from stage ``cut`` to stage ``cut + 1``."""
        return f"{self.prefix}-a{cut}"

    def gradients(self, cut: int) -> str:
        """The channel from stage ``cut + 1`` to stage ``cut``."""
        return f"{self.prefix}-g{cut}"


@dataclass(frozen=True)
class Assignment:
    """One worker's part of a run. Travels from the driver to its own child at the start.

    Attributes:
        index: the stage.
        resolved: the run; its cuts carry no loss here, the recipe gives it.
        source: makes the recipe; importable by name, since every worker calls it for itself.
        names: of the shared memory.
        run_dir: the folder of the run.
        rendezvous: where workers without common memory meet; None where every channel is in shared memory.
        attach_within_s: how long to look for the others.
        unnamed: what the worker writes instead of files in that folder, by the names of ``FILES``; None: those.
    """

    index: int
    resolved: Resolved
    source: Callable[[], Recipe]
    names: Names
    run_dir: Path
    rendezvous: Rendezvous | None = None
    attach_within_s: float = 60.0
    unnamed: Mapping[str, UnnamedFile] | None = None

    @property
    def plan(self) -> Plan:
        """The resolved plan."""
        return self.resolved.plan

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.index == self.plan.stages - 1

    @property
    def files(self) -> dict[str, Path]:
        """Where the worker writes, by the names of ``FILES``."""
        if self.unnamed is not None:
            return {what: file.path for what, file in self.unnamed.items()}
        return {what: self.run_dir / place.format(self.index) for what, place in FILES.items()}
