"""What one worker is told at its start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.recipe import Recipe
from pipeline.plan.plan import Plan
from pipeline.plan.replica_layout import called, worker_of
from pipeline.run.resolved import Resolved
from workers.channels.names import Names
from workers.channels.net.gloo import Rendezvous
from workers.worker.unnamed_file import UnnamedFile

__all__ = ["FILES", "Assignment"]

FILES = {
    "spans": "spans/stage-{}.npy",
    "model": "parts/model-{}.safetensors",
    "optimizer": "parts/optimizer-{}.safetensors",
    "stacks": "stacks-{}.txt",
}
"""What a worker writes, and where in the folder of the run it lies."""


@dataclass(frozen=True)
class Assignment:
    """One worker's part of a run. Travels from the driver to its own child at the start.

    Attributes:
        index: the stage.
        resolved: the run; its cuts carry no loss here, the recipe gives it.
        source: makes the recipe; every worker calls it for itself.
        names: of the shared memory.
        run_dir: the folder of the run.
        rendezvous: where workers without common memory meet; None where every channel is in shared memory.
        attach_within_s: how long to look for the others.
        replica: of the pipeline.
        unnamed: what the worker writes instead of files in that folder, by the names of ``FILES``; None: those.
    """

    index: int
    resolved: Resolved
    source: Callable[[], Recipe]
    names: Names
    run_dir: Path
    rendezvous: Rendezvous | None = None
    attach_within_s: float = 60.0
    replica: int = 0
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
    def worker(self) -> int:
        """The worker's number."""
        return worker_of(self.plan, self.replica, self.index)

    @property
    def device(self) -> str:
        """Where the worker computes."""
        return self.resolved.devices[self.worker]

    @property
    def called(self) -> str:
        """What users see the worker called."""
        return called(self.plan, self.replica, self.index)

    @property
    def files(self) -> dict[str, Path]:
        """Where the worker writes, by the names of ``FILES``; a further replica beside the first."""
        if self.unnamed is not None:
            return {what: file.path for what, file in self.unnamed.items()}
        paths = {what: self.run_dir / place.format(self.index) for what, place in FILES.items()}
        if self.replica == 0:
            return paths
        return {what: path.with_name(f"replica-{self.replica}-{path.name}") for what, path in paths.items()}
