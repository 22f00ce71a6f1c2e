"""How the workers of a run find what they share: by names on a host, by a meeting between hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.plan.topology import Edge

__all__ = ["Meeting", "Names"]


@dataclass(frozen=True)
class Names:
    """Names of everything shared in one run; all begin with its prefix. Every generation has channels of its own."""

    prefix: str
    generation: int = 0

    @property
    def board(self) -> str:
        """The status board."""
        return f"{self.prefix}-s"

    def bell(self, worker: int) -> str:
        """The bell of a worker, by its number (``pipeline.plan.replica_layout``)."""
        return f"{self.prefix}-b{worker}"

    def channel(self, edge: Edge) -> str:
        """The channel of an edge: after the worker at the lower end of its cut; of averages after both."""
        later = f".{self.generation}" if self.generation else ""
        if edge.what == "averages":
            return f"{self.prefix}-m{edge.source}.{edge.target}{later}"
        return f"{self.prefix}-{edge.what[0]}{min(edge.source, edge.target)}{later}"


@dataclass(frozen=True)
class Meeting:
    """A process's place at the rendezvous, of one thread: the store, and the device where its pairs listen."""

    store: Any
    device: Any
