"""The names under which the workers of a run find what they share."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Names"]


@dataclass(frozen=True)
class Names:
    """Names of everything shared in one run; all begin with the run's prefix."""

    prefix: str

    @property
    def board(self) -> str:
        """The status board."""
        return f"{self.prefix}-s"

    def bell(self, worker: int) -> str:
        """The bell of a worker, by its number (``pipeline.plan.replica_layout``)."""
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
