"""Where and how a stage computes: its device, autocast, and whether its layers are compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.messages.bundle import Bundle
from pipeline.plan.device_choice import CPU
from pipeline.plan.names import DTYPES
from pipeline.plan.plan import Plan

__all__ = ["ComputeContext"]

_Module = TypeVar("_Module", bound=nn.Module)


class ComputeContext:
    """What the plan says of computing (``autocast``, ``compile``), on one device."""

    def __init__(self, plan: Plan, device: str = CPU) -> None:
        self.device = torch.device(device)
        self.autocasts = plan.autocast is not None
        self._dtype = DTYPES[plan.autocast] if plan.autocast is not None else None
        self._compiles = plan.compile

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Layers and the loss compute matrix products in ``plan.autocast``, from weights that stay float32.

        A stage gives the dtype that its last layer gives, so the numbers are those of the unsplit model.
        """
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def placed(self, module: _Module) -> _Module:
        """The module, its parameters and buffers moved to the device; they stay the same objects."""
        return module.to(self.device)

    def here(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the device; those that are there already are given back as they are."""
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def brought(self, bundle: Bundle) -> Bundle:
        """The bundle on the device, without any graph."""
        return tuple([each if each is None else each.detach().to(self.device, non_blocking=True) for each in bundle])

    def finish(self) -> None:
        """Wait until a GPU has done all that it was given: before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def chain(self, modules: Iterable[nn.Module]) -> Callable[[Tensor], Tensor] | None:
        """All modules in a row as one function, compiled at its first call; None where nothing is compiled.

        Its random numbers follow from the generator's state at the call, but are not those of the modules one by one.
        """
        if not self._compiles:
            return None
        compiled: Callable[[Tensor], Tensor] = torch.compile(nn.Sequential(*modules))
        return compiled
