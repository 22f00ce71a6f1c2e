"""A mini-batch as people have it, and as it travels: tensors in a row, and how they lie in what was given.

(inputs, labels)     inputs: a tensor, or a tuple or dict of them, the arguments of the model; labels: any nesting
{name: tensor}       the arguments by name; the loss gets the dict
x                    the model's input; the loss gets it too (autoencoders), or leaves it (contrastive losses)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from pipeline.messages.bundle import Bundle, present

__all__ = ["Minibatch", "as_batch", "chunks", "part", "plain_batch", "rows_of", "tensors_of_value"]


class Minibatch(NamedTuple):
    """Inputs and labels of one mini-batch: tensors, or tuples, lists and dicts of them; batch dimension first."""

    inputs: Any
    labels: Any

    def tensors(self) -> tuple[Bundle, Bundle]:
        """The tensors of both."""
        return tensors_of_value(self.inputs), tensors_of_value(self.labels)


def tensors_of_value(value: Any) -> Bundle:
    """The tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def as_batch(given: Any) -> Minibatch:
    """What a recipe, a loader or a list gives, as inputs and labels; arrays of numpy become tensors on their memory."""
    value = plain_batch(given)
    if isinstance(value, tuple | list) and len(value) == 2:
        return Minibatch(*value)
    return Minibatch(value, value)


def plain_batch(value: Any) -> Any:
    """Of dicts, lists, tuples and tensors alone: tokenizers give other mappings."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, list) and value and all(isinstance(each, bool | int | float) for each in value):
        return torch.tensor(value)
    if isinstance(value, Mapping):
        return {name: plain_batch(each) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(plain_batch, value))
    if isinstance(value, tuple | list):
        return type(value)(map(plain_batch, value))
    return value


def rows_of(batch: Minibatch) -> int:
    """Its rows, those of the first tensor; 0 if that has no dimension."""
    first = present(tensors_of_value(batch.inputs)[0])
    return len(first) if first.dim() else 0


def chunks(value: Any, count: int) -> Iterator[Any]:
    """A value cut into so many parts along the batch dimension; what has none is in each."""
    tensors = tensors_of_value(value)
    rows = len(present(tensors[0])) if tensors else 0
    size = -(-rows // count)
    for start in range(0, rows, size):
        yield part(value, slice(start, start + size), rows)


def part(value: Any, rows: slice, of: int) -> Any:
    """The rows of every tensor in a value that has ``of`` rows."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == of else value
    return tree_map(lambda leaf: part(leaf, rows, of) if isinstance(leaf, Tensor) else leaf, value)
