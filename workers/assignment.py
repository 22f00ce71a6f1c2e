"""What one worker is told at its start, and the names under which it finds everybody else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.plan import Plan
from pipeline.recipe import Recipe
from pipeline.replicas import called, worker_of
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

    def bell(self, worker: int) -> str:
        """The bell of a worker, by its number (``pipeline.replicas``)."""
        return f"{self.prefix}-b{worker}"

    def activations(self, worker: int) -> str:
        """The channel from a worker to that of the stage above."""
        return f"{self.prefix}-a{worker}"

    def gradients(self, worker: int) -> str:
        """The channel to a worker from that of the stage above."""
        return f"{self.prefix}-g{worker}"

    def averages(self, source: int, target: int) -> str:
        """The channel from a worker to that of the same stage in another replica."""
        return f"{self.prefix}-m{source}.{target}"


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
        replica: of the pipeline.
    """

    index: int
    resolved: Resolved
    source: Callable[[], Recipe]
    names: Names
    run_dir: Path
    rendezvous: Rendezvous | None = None
    attach_within_s: float = 60.0
    replica: int = 0

    @property
    def plan(self) -> Plan:
        """The resolved plan."""
        return self.resolved.plan

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.index == self.plan.stages - 1

    @property
    def worker(self) -> int:
        """The worker's number."""
        return worker_of(self.plan, self.replica, self.index)

    @property
    def called(self) -> str:
        """What users see the worker called."""
        return called(self.plan, self.replica, self.index)

    @property
    def spans_path(self) -> Path:
        """Where the spans go; those of further replicas beside those of the first."""
        name = f"stage-{self.index}.npy"
        return self.run_dir / "spans" / (name if self.replica == 0 else f"replica-{self.replica}-{name}")

    def part_path(self, what: str) -> Path:
        """Where this stage's tensors go, from replica 0: ``what`` is ``model`` or ``optimizer``."""
        return self.run_dir / "parts" / f"{what}-{self.index}.safetensors"
