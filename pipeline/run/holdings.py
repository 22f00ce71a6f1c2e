"""Which tensors a user's function has or reaches: by what it is made of, or by the gradient of what it gives."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["leaves_of", "tensors_of"]


def leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward pass from here would give a ``.grad``."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def tensors_of(function: Callable[..., object], *, deep: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a callable has, by name: of modules and objects, behind ``partial`` and bound methods.

    Args:
        function: a user's.
        deep: also what functions read, their closures and globals, but for torch's own functions.
    """
    yield from _found(function, "", set(), deep=deep)


def _found(thing: Any, name: str, seen: set[int], *, deep: bool) -> Iterator[tuple[str, Tensor]]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield name or "a tensor", thing
    for key, part in _parts(thing, deep=deep):
        yield from _found(part, f"{name}.{key}" if name and key else name or key, seen, deep=deep)


def _parts(thing: Any, *, deep: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, nn.Module):
        yield from (*thing.named_parameters(), *thing.named_buffers(), *_values(vars(thing)))
    elif isinstance(thing, partial):
        yield from [("", thing.func), *((f"argument {i}", part) for i, part in enumerate(thing.args))]
        yield from thing.keywords.items()
    elif isinstance(thing, types.MethodType):
        yield from (("", thing.__self__), ("", thing.__func__))
    elif isinstance(thing, types.FunctionType):
        if deep and not thing.__module__.startswith("torch"):
            yield from _values(dict(zip(thing.__code__.co_freevars, _cells(thing), strict=True)))
            yield from _values({n: thing.__globals__.get(n) for n in thing.__code__.co_names})
    elif isinstance(thing, list | tuple):
        yield from _values({str(index): part for index, part in enumerate(thing)})
    elif isinstance(thing, dict):
        yield from _values(thing)
    elif callable(thing) and hasattr(thing, "__dict__") and not isinstance(thing, type | Tensor):
        yield from _values(vars(thing))


def _values(parts: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Those that may have tensors; hidden ones are those of ``nn.Module``, which names them itself."""
    for name, part in parts.items():
        holds = isinstance(part, Tensor | list | tuple | dict) or (callable(part) and not isinstance(part, type))
        if holds and not str(name).startswith("_"):
            yield str(name), part


def _cells(function: types.FunctionType) -> list[Any]:
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # of a variable that is not set yet
            contents.append(None)
    return contents
