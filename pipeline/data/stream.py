"""Batches that come one after the other, from a ``DataLoader`` or anything else that can be iterated again and again.

    epoch 0: iter(loader) -> batch 0, 1, ... n - 1      epoch 1: iter(loader) -> batch n, ...

Asked for in order they are read once (batch 0 twice), by the loader's own worker processes where it has some. The order
of a shuffled epoch follows from (seed, epoch): the generators are seeded before every ``iter``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pipeline.errors import PlanError
from pipeline.seeding import derived_seed, seeded

__all__ = ["Stream"]

_OVER: Any = object()


class Stream:
    """The batches of an iterable by number; going back, or another seed, begins anew and reads up to there."""

    def __init__(self, source: Iterable[Any]) -> None:
        self._source, self._first = source, dict[int, Any]()
        self._rewind(0)

    def batch(self, seed: int, index: int) -> Any:
        """Batch ``index``.

        Raises:
            PlanError: the iterable is empty.
        """
        if index == 0 and seed in self._first:
            return self._first[seed]
        if index < self._next or seed != self._seed:
            self._rewind(seed)
        while self._next < index:
            self._following()
        found = self._following()
        if index == 0:  # everybody looks at it before the start; a loader's worker processes are not kept for that
            self._first = {seed: found}
            self._rewind(seed)
        return found

    def _rewind(self, seed: int) -> None:
        self._seed, self._next, self._epoch, self._batches = seed, 0, -1, iter(())

    def _following(self) -> Any:
        self._next += 1
        if (found := next(self._batches, _OVER)) is not _OVER:
            return found
        self._epoch += 1
        if isinstance(generator := getattr(self._source, "generator", None), torch.Generator):
            generator.manual_seed(derived_seed(self._seed, "epoch", self._epoch))
        with seeded(self._seed, "epoch", self._epoch):
            self._batches = iter(self._source)
            found = next(self._batches, _OVER)  # samplers draw their order when they are first asked
        if found is _OVER:
            raise PlanError("batches gives nothing when it is iterated (again): give a list or a DataLoader.")
        return found
