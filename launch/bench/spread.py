"""A figure measured several times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread"]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, smallest and largest of the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median=statistics.median(values), min=min(values), max=max(values))

    def brief(self) -> str:
        """As in a table: ``1.85 (1.83-1.87)``."""
        return f"{self.median:.2f} ({self.min:.2f}-{self.max:.2f})"

    def times(self) -> str:
        """As a ratio: ``1.85x (1.83 to 1.87)``."""
        return f"{self.median:.2f}x ({self.min:.2f} to {self.max:.2f})"
