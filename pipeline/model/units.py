"""Where a model that is no chain can be cut: its units, and what crosses a cut before each of them.

A unit is a module with parameters that is run whole: a transformer block, a residual block, a convolution. Modules
that are lists of such blocks, or hold one that makes most of them, are looked into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.model.recording import INPUT, Recording, Ref

__all__ = ["Crossing", "CutPlace", "boundaries", "crossing", "units_of"]

Crossing = list[tuple[tuple[int, ...], torch.dtype]]

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """The units of a model by name, in the order of their registration."""
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        for inner, child in module.named_children():
            whole = f"{name}.{inner}".strip(".")
            if _learns(child) and _is_opened(child):
                visit(whole, child)
            elif _learns(child):
                found[whole] = child

    visit("", model)
    return found


def _learns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _is_opened(module: nn.Module) -> bool:
    """A list of several modules that learn; or a module that is mostly a list of blocks, which have parts too."""
    inside = [child for child in module.children() if _learns(child)]
    if isinstance(module, _LISTS):
        return len(inside) > 1 or any(map(_is_opened, inside))
    for each in module.modules():
        if each is not module and isinstance(each, _LISTS):
            blocks = [child for child in each.children() if any(map(_learns, child.children()))]
            if len(blocks) > 1 and 2 * _size(blocks) > _size([module]):
                return True
    return False


@dataclass(frozen=True)
class CutPlace:
    """A place between two events where a cut may be.

    Attributes:
        position: number of the event behind it.
        live: what crosses: the tensors given before it that somebody behind it needs.
        differentiable: how many of the tensors that cross get a gradient.
        nbytes: size of what crosses, for the recorded batch.
        wrong: why there can be no cut; empty: there can.
    """

    position: int
    live: tuple[Ref, ...]
    differentiable: int
    nbytes: int
    wrong: str = ""


def boundaries(recording: Recording, like: Mapping[str, Crossing] | None = None) -> dict[str, CutPlace]:
    """The best boundary before every unit that is called but the first, by the unit's name.

    Of the places between the call of the unit before and its own, the one where the fewest differentiable tensors
    cross, then the fewest bytes, then the last: what has no parameters stays with the layer before it. Before all that
    comes one where ``like`` crosses.
    """
    calls = [number for number, event in enumerate(recording.events) if event.unit]
    first = {recording.events[number].name: number for number in reversed(calls)}
    starts = sorted(first.values())
    found: list[CutPlace] = []
    for start in reversed(starts[1:]):
        before = max(number for number in calls if number < start)
        places = [_boundary(recording, place, found[-1] if found else None) for place in range(before + 1, start + 1)]
        wanted = (like or {}).get(recording.events[start].name)
        others = [wanted is not None and crossing(recording, each) != wanted for each in places]
        ranks = [(each.wrong, each.differentiable, each.nbytes, -each.position) for each in places]
        best = min(zip(others, ranks, places, strict=True), key=lambda each: each[:2])[2]
        found.append(best)
    return {recording.events[start].name: each for start, each in zip(starts[1:], reversed(found), strict=True)}


def crossing(recording: Recording, boundary: CutPlace) -> Crossing:
    """Shapes and dtypes of what crosses."""
    return [(given.shape, given.dtype) for given in map(recording.given, boundary.live)]


def _boundary(recording: Recording, position: int, after: CutPlace | None) -> CutPlace:
    """The boundary before an event; ``after`` is the next one that was chosen, whose needs it has to meet."""
    needed = [ref for event in recording.events[position : after.position if after else None] for ref in event.takes]
    needed += after.live if after else recording.output
    live = {ref for ref in needed if ref.event < position and not recording.is_light(ref)} | set(recording.carried)
    wrong = ""
    if reader := next((event for event in recording.events[:position] if event.reads and not event.light), None):
        wrong = f"{reader.name} reads a value that layers before the cut compute"
    for ref in live:
        if ref.event != INPUT and ref.place >= recording.events[ref.event].returned:
            wrong = f"{recording.events[ref.event].name} before the cut writes into a tensor that is used behind it"
    refs = tuple(sorted(live))
    differentiable = sum(recording.given(ref).differentiable for ref in refs)
    return CutPlace(position, refs, differentiable, _nbytes(recording, refs), wrong)


def _nbytes(recording: Recording, refs: Iterable[Ref]) -> int:
    return sum(recording.given(ref).nbytes for ref in refs)
