"""How the tensors of a bundle lie in what a layer gave, or a model or a loss takes: in a dict, in a tuple, alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Nesting"]

_PLAIN = (int, float, complex, str, bytes, bool)


@dataclass(frozen=True)
class Nesting:
    """How the tensors of a value lie in it.

    Attributes:
        leaves: the value, flattened; ... where a tensor is.
        structure: how to put it together again.
    """

    leaves: tuple[Any, ...]
    structure: TreeSpec

    @classmethod
    def of(cls, value: Any) -> Nesting:
        """Of a value like it."""
        leaves, structure = tree_flatten(value)
        return cls(tuple(_kept(leaf) for leaf in leaves), structure)

    def __reduce__(self) -> tuple[Any, ...]:
        """As a value without tensors: torch warns where a structure is unpickled."""
        return _of_bare, (tree_unflatten(list(self.leaves), self.structure),)

    @property
    def alone(self) -> bool:
        """Whether it is one tensor and nothing else."""
        return self.structure.is_leaf() and self.leaves == (...,)

    @property
    def count(self) -> int:
        """How many tensors there are."""
        return sum(leaf is ... for leaf in self.leaves)

    def value(self, tensors: Sequence[Tensor | None]) -> Any:
        """The value again, of such tensors."""
        given = iter(tensors)
        return tree_unflatten([next(given) if leaf is ... else leaf for leaf in self.leaves], self.structure)


def _of_bare(value: Any) -> Nesting:
    leaves, structure = tree_flatten(value)
    return Nesting(tuple(leaves), structure)


def _kept(leaf: Any) -> Any:
    """What is kept of a leaf: other objects than plain values may hold anything, and are None."""
    return ... if isinstance(leaf, Tensor) else leaf if isinstance(leaf, _PLAIN) else None
