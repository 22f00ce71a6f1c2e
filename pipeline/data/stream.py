"""Batches that come one after the other, from a ``DataLoader`` or anything else that can be iterated again and again.

    epoch 0: iter(loader) -> batch 0, 1, ... n - 1      epoch 1: iter(loader) -> batch n, ...

Asked for in order they are read once, by the loader's own worker processes where it has some. The order of a shuffled
epoch follows from (seed, epoch): the generators are seeded before every ``iter``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from pipeline.errors import PlanError
from pipeline.seeding import derived_seed, seeded

__all__ = ["Stream"]


class Stream:
    """The batches of an iterable by number; going back, or another seed, begins anew and reads up to there."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source = source
        self._seed, self._next, self._epoch = 0, 0, -1
        self._batches: Iterator[Any] = iter(())

    def __len__(self) -> int:
        """Batches of an epoch.

        Raises:
            TypeError: the iterable does not know.
        """
        return len(self.source)  # type: ignore[arg-type]

    def batch(self, seed: int, index: int) -> Any:
        """Batch ``index``.

        Raises:
            PlanError: the iterable is empty.
        """
        if index < self._next or seed != self._seed:
            self._seed, self._next, self._epoch, self._batches = seed, 0, -1, iter(())
        while True:
            found = self._following()
            self._next += 1
            if self._next > index:
                return found

    def _following(self) -> Any:
        for batch in self._batches:
            return batch
        self._epoch += 1
        if isinstance(generator := getattr(self.source, "generator", None), torch.Generator):
            generator.manual_seed(derived_seed(self._seed, "epoch", self._epoch))
        with seeded(self._seed, "epoch", self._epoch):
            self._batches = iter(self.source)
        for batch in self._batches:
            return batch
        raise PlanError("batches gives nothing when it is iterated (again): give a list, a DataLoader, or a function.")
