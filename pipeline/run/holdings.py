"""Which tensors a user's function has or reaches."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["tensors_of"]

_UNSET = types.CellType()  # of a variable that is not set yet


def tensors_of(thing: Any, *, deep: bool, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a callable has, by name: of modules and objects, behind ``partial`` and bound methods.

    ``deep``: also what functions read, their closures and globals, but for torch's own functions.
    """
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield name or "a tensor", thing
    for key, part in _parts(thing, deep=deep):
        yield from tensors_of(part, deep=deep, name=".".join(filter(None, (name, key))), seen=seen)


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
            cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
            yield from _values({name: cell.cell_contents for name, cell in cells if cell != _UNSET})
            yield from _values({n: thing.__globals__.get(n) for n in thing.__code__.co_names})
    elif isinstance(thing, list | tuple):
        yield from _values(dict(enumerate(thing)))
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
