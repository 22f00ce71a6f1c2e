"""What one worker is told at its start, and the names under which it finds everybody else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.plan import Plan
from pipeline.recipe import Recipe
from pipeline.resolve import Resolved
from workers.gloo import Rendezvous

__all__ = ["Assignment", "Names"]


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
        run_dir: where the worker writes its spans and its part of the weights.
        rendezvous: where workers without common memory meet; None where every channel is in shared memory.
        attach_within_s: how long to look for the others.
    """

    index: int
    resolved: Resolved
    source: Callable[[], Recipe]
    names: Names
    run_dir: Path
    rendezvous: Rendezvous | None = None
    attach_within_s: float = 60.0

    @property
    def plan(self) -> Plan:
        """The resolved plan."""
        return self.resolved.plan

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.index == self.plan.stages - 1

    @property
    def spans_path(self) -> Path:
        """Where the spans go."""
        return self.run_dir / "spans" / f"stage-{self.index}.npy"

    def part_path(self, what: str) -> Path:
        """Where this stage's tensors go: ``what`` is ``model`` or ``optimizer``."""
        return self.run_dir / "parts" / f"{what}-{self.index}.safetensors"
