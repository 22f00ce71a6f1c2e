"""Parts of a model that keeps its own forward: each calls it whole, and what is not of the part passes through.

    bundle (what crossed the cut below)  -->  model.forward, from one boundary to the next  -->  bundle (what crosses)

Before the part, units and torch functions are not run: what they would give is what has crossed, or a placeholder of
the right shape that nobody reads. At its end the forward is left. So Python's control flow, masks, several inputs and
long skips stay what they are in the model, and the numbers of the parts are those of the whole to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from pipeline.errors import PlanError
from pipeline.messages.bundle import Bundle, as_bundle, as_value
from pipeline.model.given_model import copy_of
from pipeline.model.partition import Layer
from pipeline.model.recording import INPUT, Recording, Ref, intercepted, record, tensors_in
from pipeline.model.replay import EndOfPart, Placeholders, Replay
from pipeline.model.units import Crossing, CutPlace, boundaries, crossing, units_of
from pipeline.seeding import seeded
from pipeline.user_code import calling

__all__ = ["Segment", "Trace", "copies_of", "fused", "network_of", "parts_of", "trace"]

_MOST_SHAPES = 64
_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


@dataclass(frozen=True)
class Trace:
    """How a model's forward goes, in training and in evaluation, and where it can be cut.

    Attributes:
        recordings: by whether it is training.
        entries: the boundary that every part begins with, likewise; None for the first, which begins with the inputs.
        names: of the parts: of the units that they begin with.
        holds: the names of the units and of the single parameters and buffers that every part computes with.
        leaves: the arguments, flattened; ... where a tensor is.
        structure: how to put (args, kwargs) together again.
        rows: of the batch that was recorded; a size that is a multiple of it grows with the batch.
    """

    recordings: dict[bool, Recording]
    entries: dict[bool, list[CutPlace | None]]
    names: Sequence[str]
    holds: Sequence[Sequence[str]]
    leaves: Sequence[Any]
    structure: TreeSpec
    rows: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Trace:
        """A model is copied, what is known of it is not."""
        return self


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Call copies of a model with the inputs of a batch, in training and in evaluation; see where it can be cut.

    Raises:
        PlanError: there is no place for a cut, or the two ways differ in the layers or in what crosses a cut.
    """
    rows, (args, kwargs) = _recorded_rows(model, (args, kwargs))
    recordings: dict[bool, Recording] = {}
    found: dict[bool, dict[str, CutPlace]] = {}
    like: dict[str, Crossing] | None = None
    for training in (True, False):
        copied = copy_of(model)
        if not training:
            copied.eval()
        with torch.set_grad_enabled(training), seeded(0, "trace"), calling(f"{type(model).__name__}.forward"):
            recordings[training] = record(copied, units_of(copied), args, kwargs)
        found[training] = boundaries(recordings[training], like)
        like = {name: crossing(recordings[training], each) for name, each in found[training].items()}
    kind, names = type(model).__name__, list(found[True])
    if names != list(found[False]):
        raise PlanError(f"{kind}.forward calls other layers in evaluation than in training: it cannot be split.")
    legal = [name for name in names if not (found[True][name].wrong or found[False][name].wrong)]
    if names and not legal:
        why = found[True][names[0]].wrong or found[False][names[0]].wrong
        raise PlanError(f"{kind} cannot be cut anywhere: {why}.")
    for name in legal:
        if like is not None and crossing(recordings[True], found[True][name]) != like[name]:
            raise PlanError(f"{kind}: other tensors cross a cut before {name} in evaluation than in training.")
    entries: dict[bool, list[CutPlace | None]] = {way: [None, *(found[way][name] for name in legal)] for way in found}
    first = next((event.name for event in recordings[True].events if event.unit), None)
    if first is None:
        raise PlanError(f"{kind}.forward calls no layer with parameters.")
    leaves, structure = tree_flatten((args, kwargs))
    bare = [... if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    holds = _holds(model, recordings[True], entries[True])
    return Trace(recordings, entries, [first, *legal], holds, bare, structure, rows)


def _recorded_rows(model: nn.Module, inputs: Any) -> tuple[int, Any]:
    """Inputs of so many rows that a size tells whether it grows with the batch: a prime that divides no other size.
    The rows are those of the batch, some of them several times where it has fewer.
    """
    tensors = tensors_in(inputs)
    rows = len(tensors[0])
    others = {size for tensor in (*tensors, *model.parameters(), *model.buffers()) for size in tensor.shape} - {rows}
    count = next((prime for prime in _PRIMES if all(size % prime for size in others)), _PRIMES[-1])
    these = torch.arange(count) % rows

    def taken(leaf: Any) -> Any:
        return leaf[these] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows else leaf

    return count, tree_map(taken, inputs)


def _holds(model: nn.Module, recording: Recording, entries: Sequence[CutPlace | None]) -> list[list[str]]:
    """Of every part; what no event computes with is of the first."""
    starts = [0 if each is None else each.position for each in entries]
    holds = [
        list(dict.fromkeys(name for event in recording.events[a:b] for name in _names(event)))
        for a, b in pairwise([*starts, len(recording.events)])
    ]
    mine = tuple(f"{name}." for names in holds for name in names)
    unused = [
        name
        for named in (model.named_parameters, model.named_buffers)
        for name, _ in named(remove_duplicate=False)
        if not f"{name}.".startswith(mine)
    ]
    holds[0] += unused
    return holds


def _names(event: Any) -> tuple[str, ...]:
    return (event.name,) if event.unit else event.weights


class Segment(nn.Module):
    """The parts ``first`` to ``last`` of a model, as one module from a bundle to a bundle; the last part gives what the
    model gives. Parameters and buffers have the names that they have in the model.
    """

    def __init__(self, model: nn.Module, known: Trace, first: int, last: int) -> None:
        super().__init__()
        self._model_of, self._trace, self._first, self._last = [model], known, first, last  # in a list: it is no child
        units = self._units = units_of(model)
        inside = {id(module) for unit in units.values() for module in unit.modules()}
        self._outside = [(module, module.training) for module in model.modules() if id(module) not in inside]
        self._held: list[tuple[dict[str, Any], dict[str, Any], str]] = []
        names = dict.fromkeys(name for holds in known.holds[first : last + 1] for name in holds)
        whole = tuple(f"{name}." for name in names if name in units)
        for name in (name for name in names if not name.startswith(whole)):  # what units hold they bring along
            path, _, last_name = name.rpartition(".")
            holder, owner = self._holder(path), model.get_submodule(path)
            if name in units:
                holder.add_module(last_name, units[name])
            elif (parameter := owner._parameters.get(last_name)) is not None:
                holder.register_parameter(last_name, parameter)
                self._held.append((holder._parameters, owner._parameters, last_name))
            else:
                lasting = last_name not in owner._non_persistent_buffers_set
                holder.register_buffer(last_name, owner._buffers[last_name], persistent=lasting)
                self._held.append((holder._buffers, owner._buffers, last_name))
        self._dead: dict[tuple[object, ...], dict[Ref, Tensor]] = {}

    def train(self, mode: bool = True) -> Segment:
        """Into training or evaluation, together with what the model calls between its units."""
        for module, was in self._outside:
            module.training = was and mode
        return super().train(mode)

    def forward(self, value: Any) -> Any:
        """What crosses the cut behind the part, for what crosses the one before it."""
        return self.run(value, _nothing)

    def run(self, value: Any, enter: Callable[[int], None]) -> Any:
        """``forward``; ``enter`` is told the number of every part before that begins."""
        for mine, theirs, name in self._held:
            theirs[name] = mine[name]
        known = self._trace
        entries = [*known.entries[self.training], None]
        start, end = entries[self._first], entries[self._last + 1]
        recording = known.recordings[self.training]
        enters = {
            0 if each is None else each.position: self._first + index
            for index, each in enumerate(entries[self._first : self._last + 1])
        }
        bundle = as_bundle(value)
        refs = start.live if start else [Ref(INPUT, place) for place in range(len(recording.inputs))]
        dead = self._placeholders(recording, refs, bundle)
        given = dict(zip(refs, bundle, strict=True))
        for ref in recording.carried:  # the entrance of a stage has every floating-point tensor ask for a gradient
            if (tensor := given.get(ref)) is not None:
                given[ref] = tensor.detach()
        replay = Replay(recording, start, end, given, dead, enter, enters)
        leaves, tensors = list(known.leaves), iter(range(len(recording.inputs)))
        for place, leaf in enumerate(leaves):
            if leaf is ...:
                leaves[place] = replay.argument(next(tensors))
        args, kwargs = tree_unflatten(leaves, known.structure)
        try:
            with intercepted(self._units, replay.unit), replay:
                output = self._model_of[0](*args, **kwargs)
        except EndOfPart:
            return as_value(replay.crossing())
        if end is not None:
            raise RuntimeError(f"the model's forward ended before layer {known.names[self._last + 1]}")
        replay.check("the output", output)
        return output

    def _holder(self, path: str) -> nn.Module:
        holder: nn.Module = self
        for name in path.split(".") if path else ():
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        return holder

    def _placeholders(self, recording: Recording, refs: Sequence[Ref], bundle: Bundle) -> dict[Ref, Tensor]:
        """Placeholders for batches of this shape: what they are made as is known of a batch of another one."""
        rows, sizes = self._trace.rows, dict[int, int]()
        for ref, tensor in zip(refs, bundle, strict=True):
            if tensor is not None:
                pairs = zip(recording.given(ref).shape, tensor.shape, strict=True)
                sizes |= {was: now for was, now in pairs if was != now or was == rows}
        device = next((str(tensor.device) for tensor in bundle if tensor is not None), "cpu")
        if len(self._dead) >= _MOST_SHAPES:
            self._dead.clear()
        key = (self.training, device, *sizes.items())
        return self._dead.setdefault(key, Placeholders(recording, rows, sizes, device))


def parts_of(model: nn.Module, known: Trace) -> list[Layer]:
    """All parts of a model, one by one."""
    return [Layer(k, name, Segment(model, known, k, k), part=True) for k, name in enumerate(known.names)]


def copies_of(layers: Sequence[Layer]) -> list[nn.Module]:
    """Copies of the modules of layers; all parts of one model are parts of one copy."""
    first = layers[0].module
    if not isinstance(first, Segment):
        return [copy_of(layer.module) for layer in layers]
    copied = copy_of(first._model_of[0])
    return [Segment(copied, first._trace, layer.index, layer.index) for layer in layers]


def fused(layers: Sequence[Layer]) -> Segment | None:
    """Parts in a row as one; None: these are layers of a chain."""
    first = layers[0].module
    if not isinstance(first, Segment):
        return None
    return Segment(first._model_of[0], first._trace, layers[0].index, layers[-1].index)


def network_of(layers: Sequence[Layer]) -> nn.Module:
    """All layers of a model as one module, from the inputs as a bundle to what the model gives."""
    return fused(layers) or nn.Sequential(*(layer.module for layer in layers))


def _nothing(index: int) -> None:
    pass
