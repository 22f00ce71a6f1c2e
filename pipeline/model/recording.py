"""What a model's own forward does, as a list of events, so that a stage can call that forward and compute a part of it.

An event is a call of a *unit* (a module with parameters that is not looked into, such as a transformer block) or, in
the Python between units, of a torch function. What an event takes and gives is known by number, so for every place
between two events it is known which tensors somebody behind it still needs.

model(*args, **kwargs)  --record-->  Recording  --boundary-->  what crosses a cut before an event
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from pipeline.errors import PlanError

__all__ = ["INPUT", "Given", "Operation", "Recording", "Ref", "intercepted", "outside_of_modes", "record", "tensors_in"]

INPUT = -1
"""Number of the event that gives the inputs of the model."""


class Ref(NamedTuple):
    """A tensor, by the number of the event that gave it and its place among what that gave."""

    event: int
    place: int


class Given(NamedTuple):
    """What a tensor was like on the recorded batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Operation:
    """One call that was made.

    Attributes:
        name: of the unit, or of the torch function.
        what: the function; for a unit its name.
        unit: whether a unit was called.
        takes: the tensors it took that other events gave.
        weights: parameters and buffers that a torch function took, by name.
        gives: the tensors it gave, then those it wrote into without giving them.
        leaves: what it gave, flattened; ... where a tensor was.
        structure: how to put that together again.
        light: it follows from ``carried`` inputs; nothing with a gradient, random or written over is in it or before
            it: every stage computes it for itself.
    """

    name: str
    what: Any
    unit: bool
    takes: tuple[Ref, ...]
    weights: tuple[str, ...]
    gives: tuple[Given, ...]
    leaves: tuple[Any, ...]
    structure: TreeSpec
    light: bool

    @property
    def returned(self) -> int:
        """How many of the tensors were given back."""
        return sum(leaf is ... for leaf in self.leaves)

    @property
    def reads(self) -> bool:
        """Whether Python got to know a value."""
        return not self.gives


@dataclass
class Recording:
    """One call of a model.

    Attributes:
        inputs: the tensors among its arguments, flattened.
        events: in order.
        output: the tensors it gave.
        free: functions that are no events: they ask for shapes and the like, or have no tensor to do with.
        random: functions that drew random numbers.
        carried: inputs that cross every cut, such as masks: light events need them.
    """

    inputs: list[Given] = field(default_factory=list)
    events: list[Operation] = field(default_factory=list)
    output: tuple[Ref, ...] = ()
    free: set[Any] = field(default_factory=set)
    random: set[Any] = field(default_factory=set)
    carried: tuple[Ref, ...] = ()

    @cached_property
    def heavy(self) -> list[tuple[int, Operation]]:
        """The events that one stage computes, with their numbers, in order; the recording is over."""
        return [(number, event) for number, event in enumerate(self.events) if not event.light]

    def sources(self, ref: Ref) -> set[Ref]:
        """The inputs that a light tensor is computed from."""
        inputs, seen, waiting = set[Ref](), set[Ref](), [ref]
        while waiting:
            each = waiting.pop()
            if each.event == INPUT:
                inputs.add(each)
            elif each not in seen:
                seen.add(each)
                waiting += self.events[each.event].takes
        return inputs

    def given(self, ref: Ref) -> Given:
        """What a tensor was like."""
        return self.inputs[ref.place] if ref.event == INPUT else self.events[ref.event].gives[ref.place]

    def is_light(self, ref: Ref) -> bool:
        """Whether any stage may compute it, from the inputs."""
        return ref.event != INPUT and self.events[ref.event].light

    def __deepcopy__(self, memo: dict[int, Any]) -> Recording:
        """A model is copied, what it did is not."""
        return self


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers, in the order of ``tree_flatten``, which takes ten times as long."""
    found: list[Tensor] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif type(value) in (tuple, list, dict):
        for each in value.values() if type(value) is dict else value:
            _gather(each, found)
    elif not isinstance(value, _NO_CONTAINERS):
        found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


_NO_CONTAINERS = (int, float, str, type(None), torch.dtype, torch.device, torch.Size, slice, type(...))


@contextlib.contextmanager
def intercepted(units: Mapping[str, nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile a unit that is called, hooks and all, becomes ``call(name, the unit's own call, args, kwargs)``."""
    try:
        for name, unit in units.items():
            vars(unit)["_call_impl"] = _Intercepted(call, name, unit._call_impl)
        yield
    finally:
        for unit in units.values():
            vars(unit).pop("_call_impl", None)


class _Intercepted:
    def __init__(self, call: Callable[..., Any], name: str, own: Callable[..., Any]) -> None:
        self.call, self.name, self.own = call, name, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.name, self.own, args, kwargs)


@contextlib.contextmanager
def outside_of_modes(mode: TorchFunctionMode) -> Iterator[None]:
    """Meanwhile ``mode``, the innermost one, is not told of functions."""
    torch._C._pop_torch_function_stack()
    try:
        yield
    finally:
        torch._C._push_on_torch_function_stack(mode)


def record(model: nn.Module, units: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: Any) -> Recording:
    """Call a model once, in the mode it is in, and note what it does.

    Raises:
        PlanError: a unit hands tensors on inside an object that cannot be looked into.
    """
    recorder = _Recorder(model, args, kwargs)
    with intercepted(units, recorder.unit), recorder:
        output = model(*args, **kwargs)
    recording = recorder.recording
    recording.output = tuple(recorder.source(tensor, "the model's output") for tensor in tensors_in(output))
    _settle(recording)
    return recording


def _settle(recording: Recording) -> None:
    """Light is only what Python reads or somebody behind the first unit needs: a network's images need not travel."""
    first = next((number for number, event in enumerate(recording.events) if event.unit), 0)
    late = [event for number, event in enumerate(recording.events) if number > first and not event.light]
    refs = [ref for event in late for ref in event.takes] + list(recording.output)
    refs += [ref for event in recording.events if event.light and event.reads for ref in event.takes]
    carried = {source for ref in refs if recording.is_light(ref) for source in recording.sources(ref)}
    carried |= {
        ref for event in recording.events if event.light and event.reads for ref in event.takes if ref.event < 0
    }
    recording.carried = tuple(sorted(carried))
    for number, event in enumerate(recording.events):
        sources = {source for ref in event.takes for source in recording.sources(ref)} if event.light else set()
        if event.light and not sources <= carried:
            recording.events[number] = replace(event, light=False)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        super().__init__()
        self.recording = Recording()
        self._sources: dict[int, Ref] = {}
        self._alive: list[Tensor] = []  # a number stands for one tensor as long as that is there
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._buffers = {id(buffer): name for name, buffer in model.named_buffers()}
        inputs = tensors_in((args, kwargs))
        self._gives(INPUT, inputs)
        self.recording.inputs = [_given(tensor) for tensor in inputs]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _asks(func):
            self.recording.free.add(func)
            return func(*args, **kwargs)
        return self._event(resolve_name(func) or repr(func), func, func, args, kwargs, unit=False)

    def unit(self, name: str, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A unit is called."""
        with outside_of_modes(self):
            return self._event(name, name, own, args, kwargs, unit=True)

    def source(self, tensor: Tensor, taker: str) -> Ref:
        """Which event gave a tensor that was computed."""
        if id(tensor) not in self._sources:
            raise PlanError(
                f"{taker} takes a tensor that nothing seen in the model's forward gave: a layer hands it on inside an "
                "object that cannot be looked into; let layers give tensors, tuples, lists or dicts of them."
            )
        return self._sources[id(tensor)]

    def _event(self, name: str, what: Any, call: Callable[..., Any], args: Any, kwargs: Any, *, unit: bool) -> Any:
        taken = tensors_in((args, kwargs))
        versions, random = [tensor._version for tensor in taken], torch.get_rng_state()
        result = call(*args, **kwargs)
        leaves, structure = tree_flatten(result)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not given and not taken:
            self.recording.free.add(what)
            return result
        takes = tuple(
            self.source(tensor, name)
            for tensor in taken
            if id(tensor) in self._sources or (tensor.grad_fn is not None and id(tensor) not in self._buffers)
        )
        learned = [self._parameters[id(tensor)] for tensor in taken if id(tensor) in self._parameters]
        returned = {id(tensor) for tensor in given}
        pairs = zip(taken, versions, strict=True)
        written = [tensor for tensor, before in pairs if tensor._version != before and id(tensor) not in returned]
        light = not (unit or written or any(tensor.requires_grad for tensor in (*taken, *given)))
        light = light and all(ref.event == INPUT or self.recording.events[ref.event].light for ref in takes)
        draws = not torch.equal(random, torch.get_rng_state())
        event = Operation(
            name=name,
            what=what,
            unit=unit,
            takes=takes,
            weights=(*learned, *(self._buffers[id(tensor)] for tensor in taken if id(tensor) in self._buffers)),
            gives=tuple(map(_given, given + written)),
            leaves=tuple(... if isinstance(leaf, Tensor) else leaf for leaf in leaves),
            structure=structure,
            light=light and not draws,
        )
        if draws:
            self.recording.random.add(what)
        self._alive += taken
        self._gives(len(self.recording.events), given + written)
        self.recording.events.append(event)
        return result

    def _gives(self, event: int, tensors: list[Tensor]) -> None:
        self._alive += tensors
        self._sources |= {id(tensor): Ref(event, place) for place, tensor in enumerate(tensors)}


def _given(tensor: Tensor) -> Given:
    return Given(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _asks(func: Any) -> bool:
    """Whether a function of a tensor asks for its shape, dtype or the like, which need no values."""
    name = getattr(func, "__name__", "")
    return (getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name) in _METADATA


_METADATA = frozenset(
    (
        *("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__", "stride", "is_contiguous"),
        *("dtype", "device", "layout", "itemsize", "nbytes", "element_size", "get_device", "is_cuda", "is_cpu"),
        *("is_meta", "is_sparse", "is_nested", "is_quantized", "is_floating_point", "is_complex", "is_signed"),
        *("requires_grad", "is_leaf", "grad_fn", "names", "_version", "__hash__"),
    )
)
