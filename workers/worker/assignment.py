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

__all__ = ["FILES", "Assignment", "files_in"]

FILES = {
    "spans": "spans/stage-{}.npy",
    "model": "parts/model-{}.safetensors",
    "optimizer": "parts/optimizer-{}.safetensors",
    "stacks": "stacks-{}.txt",
}
"""What a worker writes, and where in the folder of the run it lies."""


@dataclass(frozen=True)
class Assignment:
    """One worker's part of a run. Travels from the driver to its own child at the start."""

    index: int  # of the stage
    resolved: Resolved  # its cuts carry no loss here, the recipe gives it
    source: Callable[[], Recipe]  # every worker calls it for itself
    names: Names  # of the shared memory
    run_dir: Path
    rendezvous: Rendezvous | None = None  # where workers without common memory meet; None: all share memory
    attach_within_s: float = 60.0  # how long to look for the others
    replica: int = 0
    unnamed: Mapping[str, UnnamedFile] | None = None  # written instead of files in run_dir, by the names of FILES

    @property
    def plan(self) -> Plan:
        return self.resolved.plan

    @property
    def last(self) -> bool:
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
        """Where the worker writes, by the names of ``FILES``."""
        if self.unnamed is None:
            return files_in(self.run_dir, self.index, self.replica)
        return {what: file.path for what, file in self.unnamed.items()}


def files_in(run_dir: Path, stage: int, replica: int) -> dict[str, Path]:
    """A worker's files in the folder of the run, by the names of ``FILES``; a further replica's beside the first's."""
    paths = {what: run_dir / place.format(stage) for what, place in FILES.items()}
    return {w: path.with_name(f"replica-{replica}-{path.name}") for w, path in paths.items()} if replica else paths
