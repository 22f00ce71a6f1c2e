"""One call of a model's forward in which a part of it is computed: what the calls before the part give, and its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_unflatten

from pipeline.errors import PlanError
from pipeline.messages.bundle import Bundle
from pipeline.model.recording import INPUT, Given, Recording, Ref, outside_of_modes, tensors_in
from pipeline.model.units import CutPlace

__all__ = ["EndOfPart", "Placeholders", "Replay"]


class Placeholders(dict[Ref, Tensor]):
    """Tensors of one element's memory each, made when they are asked for."""

    def __init__(self, recording: Recording, rows: int, sizes: dict[int, int], device: str) -> None:
        super().__init__()
        self._recording, self._rows, self._sizes, self._device = recording, rows, sizes, device

    def __missing__(self, ref: Ref) -> Tensor:
        given: Given = self._recording.given(ref)
        now = self._sizes.get(self._rows, self._rows)
        grown = (size // self._rows * now if size and size % self._rows == 0 else size for size in given.shape)
        shape = [self._sizes.get(size, new) for size, new in zip(given.shape, grown, strict=True)]
        tensor = self[ref] = torch.zeros((), dtype=given.dtype, device=self._device).expand(shape)
        return tensor


class EndOfPart(BaseException):
    """The forward has come to the end of the part; no ``except Exception`` of the model's is to catch it."""


class Replay(TorchFunctionMode):
    """One call of the forward. Heavy events come in the recorded order; what is light is computed as it comes."""

    def __init__(
        self,
        recording: Recording,
        start: CutPlace | None,
        end: CutPlace | None,
        given: dict[Ref, Tensor | None],
        dead: dict[Ref, Tensor],
        enter: Callable[[int], None],
        enters: dict[int, int],
    ) -> None:
        super().__init__()
        self._recording, self._given, self._dead, self._enter, self._enters = recording, given, dead, enter, enters
        self._events = recording.heavy
        self._start, self._end = start.position if start else 0, end.position if end else len(recording.events)
        self._wanted = end.live if end else ()
        self._wanted_of = {ref.event for ref in self._wanted}
        self._next = 0
        self._heavy: dict[int, Tensor] = {}
        self._unknown: set[int] = set()

    def argument(self, place: int) -> Tensor | None:
        """An argument of the model: what has crossed, or a placeholder."""
        ref = Ref(INPUT, place)
        return self._value(ref, heavy=ref not in self._recording.carried)

    def check(self, what: str, value: Any) -> None:
        """Refuse placeholders where a value is needed: the cut below sends what batch 0 needed there."""
        if self._unknown and any(id(tensor) in self._unknown for tensor in tensors_in(value)):
            raise PlanError(
                f"{what} takes something else than on batch 0, which lies below the cut and does not cross it: a "
                "forward that chooses by the batch between what layers gave cannot be split there."
            )

    def crossing(self) -> Bundle:
        """What crosses the cut behind the part."""
        return tuple(self._given[ref] for ref in self._wanted)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._recording.free or not (func in self._recording.random or self._is_heavy((args, kwargs))):
            return func(*args, **kwargs)
        return self._event(func, func, args, kwargs)

    def unit(self, name: str, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A unit is called."""
        with outside_of_modes(self):
            return self._event(name, own, args, kwargs)

    def _event(self, what: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number, event = self._events[self._next] if self._next < len(self._events) else (self._end, None)
        if number >= self._end and self._end < len(self._recording.events):
            raise EndOfPart
        if event is None or event.what != what:
            raise PlanError(
                f"the model's forward does something else than on batch 0: {getattr(what, '__name__', what)} where "
                f"{event.name if event else 'its end'} was: a forward whose layers depend on the batch cannot be split."
            )
        self._next += 1
        while self._enters and number >= next(iter(self._enters)):
            self._enter(self._enters.pop(next(iter(self._enters))))
        if number < self._start:
            values = (self._value(Ref(number, place), heavy=True) for place in range(event.returned))
            return tree_unflatten([next(values) if leaf is ... else leaf for leaf in event.leaves], event.structure)
        self.check(event.name, (args, kwargs))
        result = call(*args, **kwargs)
        given = tensors_in(result)
        self._heavy.update((id(tensor), tensor) for tensor in given)
        if number in self._wanted_of:
            self._given |= {Ref(number, place): tensor for place, tensor in enumerate(given)}
        return result

    def _value(self, ref: Ref, *, heavy: bool) -> Tensor | None:
        known = ref in self._given
        value = self._given[ref] if known else self._dead[ref]
        if heavy and value is not None:
            self._heavy[id(value)] = value
            self._unknown |= set() if known else {id(value)}
        return value

    def _is_heavy(self, value: Any) -> bool:
        """Whether a tensor in it came out of a heavy event, or is a parameter."""
        if isinstance(value, Tensor):
            return id(value) in self._heavy or value.requires_grad
        if isinstance(value, dict):
            value = value.values()
        elif not isinstance(value, tuple | list):
            return False
        return any(map(self._is_heavy, value))
