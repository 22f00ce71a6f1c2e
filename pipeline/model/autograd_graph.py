"""What a backward pass from a tensor would go through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["leaves_of", "nodes_behind"]


def nodes_behind(tensor: Tensor) -> Iterator[Any]:
    """The nodes of its graph, each once."""
    nodes, seen = list[Any]([tensor.grad_fn]), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes += [following for following, _ in node.next_functions]


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward pass from here would give a ``.grad``."""
    return (node.variable for node in nodes_behind(tensor) if hasattr(node, "variable"))
