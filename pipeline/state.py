"""What a component remembers, as plain values that can be written and read again.

``state()`` gives a tree of tensors, numbers, texts and lists, between two batches, with nothing in flight;
``load_state()`` takes it up in a component that was built anew in the same way, which then goes on as the first one
would have. A stage's state is the tree of all its parts (``pipeline.stage.stage``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["State", "Stateful", "attributes", "load_module", "module_state", "plain", "set_attributes"]

State = dict[str, Any]
"""Names to tensors (copies), numbers, texts, None, lists of these, or further states."""


class Stateful(Protocol):
    """A component that remembers."""

    def state(self) -> State:
        """A copy of what it remembers."""

    def load_state(self, state: State) -> None:
        """Take up what ``state()`` of such a component gave."""


def attributes(component: object, names: Iterable[str]) -> State:
    """The named attributes, numbers or sequences of numbers, as a state."""
    return {name.lstrip("_"): plain(getattr(component, name)) for name in names}


def set_attributes(component: object, names: Iterable[str], state: State) -> None:
    """Set the named attributes from what ``attributes`` gave."""
    for name in names:
        value, before = plain(state[name.lstrip("_")]), getattr(component, name)
        if isinstance(before, deque):
            value = deque((tuple(item) if isinstance(item, list) else item for item in value), before.maxlen)
        setattr(component, name, value)


def module_state(module: nn.Module) -> State:
    """Copies of a module's parameters and buffers, and of what it says besides, by name."""
    return dict(plain(module.state_dict()))


def load_module(module: nn.Module, state: State) -> None:
    """Put into a module what ``module_state`` gave, in place; RuntimeError where names or shapes are others."""
    module.load_state_dict(state)


def plain(value: Any) -> Any:
    """A copy of a value in the terms of a state: sequences as lists, tensors as tensors of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple | deque) else value
