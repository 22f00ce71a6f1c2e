"""The layers of a stage, run: seeded one by one, on stashed weights, compiled, in training and in evaluation.

Weights are *stashed* where they will change between a forward pass and the last backward pass through it: the layers
run on copies of their parameters and buffers, during the backward passes too (activation checkpointing computes layers
anew there). Gradients found on the copies are applied to the weights of today.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.errors import StageError
from pipeline.messages.bundle import Bundle, as_bundle, as_value, differentiable, is_bundle, is_differentiable
from pipeline.messages.nesting import Nesting
from pipeline.model.checkpointing import checkpoints_reentrantly
from pipeline.model.compute import ComputeContext
from pipeline.model.given_model import ModuleModes
from pipeline.model.partition import Layer
from pipeline.model.segment import Segment, fused
from pipeline.model.unwritten import Unwritten
from pipeline.plan.plan import Plan
from pipeline.seeding import seed_layer
from pipeline.state import State, load_module, module_state
from pipeline.wording import said

__all__ = ["StageLayers", "Stash"]

Stash = dict[str, Tensor]
"""Copies of a stage's parameters and buffers, by their names within it; empty: today's own."""

_Entrance = Callable[[Tensor], Tensor]


class StageLayers:
    """The layers of one stage, already initialised; they are moved to where it computes.

    A layer is called with a tensor, or with a tuple where the bundle has several.
    """

    def __init__(self, layers: Sequence[Layer], index: int, plan: Plan, computing: ComputeContext) -> None:
        self.layers, self._index, self._plan, self._computing = layers, index, plan, computing
        self._whole = fused(layers)  # parts of a model's own forward are run in one call of it
        modules = [layer.module for layer in layers] if self._whole is None else [self._whole]
        self._modules = computing.placed(_Modules(modules))
        self._outlets: dict[bool, Nesting | None] = {}
        self.compiled = computing.chain([layer.module for layer in layers])
        self.parameters = [p for p in self._modules.parameters() if p.requires_grad]  # each once
        self._modes = ModuleModes(self._modules)
        writes = None  # a compiled chain is asked: it would be compiled once more for the copies of a first call
        if self.compiled is not None:
            writes = any(getattr(module, "inplace", False) for module in layers[0].module.modules())
        self._run = Unwritten(self._run_layers, writes)
        self._needs_input_gradient: bool | None = None

    @property
    def needs_input_gradient(self) -> bool:
        """Whether the input has to require a gradient even where nobody wants it: what is checkpointed reentrantly
        learns nothing without. True until the first batch has told.
        """
        return self._needs_input_gradient is not False

    def training(self, mode: bool) -> None:
        """Into training, or into evaluation; a backward pass too is made in training, as it may compute layers anew."""
        self._modes.switch(mode)

    def forward(self, batch: int, seeded: int, x: Bundle, stash: Stash, enter: _Entrance | None) -> Bundle:
        """The output, with its graph, of the layers run on the ``stash``; a layer that fails is named.

        ``seeded``, the batch or the number of the microbatch, fixes the random numbers; ``enter`` stands for the first
        layer, if given.
        """
        with self._computing.autocast():
            h = self._bundle(self.within(stash, self._run, batch, seeded, enter, *x), training=True)
        if stash:
            with torch.no_grad():
                for name, buffer in self._modules.named_buffers():
                    buffer.copy_(stash[name])
        if self._needs_input_gradient is None:
            self._needs_input_gradient = any(checkpoints_reentrantly(each) for each in h if each is not None)
        return h

    def evaluate(self, batch: int, x: Bundle) -> Bundle:
        """The output for a held-out batch, in evaluation mode."""
        with self._computing.autocast():
            return self._bundle(self._run(batch, None, None, *x), training=False)

    def value(self, h: Bundle, *, training: bool) -> Any:
        """An output as the last layer gives it: a tensor, or the container that the tensors lie in."""
        outlet = self._outlets.get(training)
        return as_value(h) if outlet is None else outlet.value(h)

    def stash(self) -> Stash:
        """A copy of every parameter and buffer, for each module that has it: tied ones stay tied."""
        copies: dict[int, Tensor] = {}
        named = [
            (f"{prefix}.{name}", tensor)
            for prefix, module in self._modules.named_modules()
            for tensors in (module.named_parameters, module.named_buffers)
            for name, tensor in tensors(recurse=False, remove_duplicate=False)
        ]
        return {name: copies.setdefault(id(tensor), _stashed(tensor)) for name, tensor in named}

    def leaves(self, stash: Stash) -> list[Tensor]:
        """What gradients are taken for: ``parameters``, or their stashed copies."""
        if not stash:
            return list(self.parameters)
        return [stash[name] for name, parameter in self._modules.named_parameters() if parameter.requires_grad]

    def take_gradients(self, leaves: Sequence[Tensor]) -> None:
        """Give the gradients found on stashed copies to the weights of today."""
        for parameter, copied in zip(self.parameters, leaves, strict=True):
            parameter.grad, copied.grad = copied.grad, None

    def within(self, stash: Stash, call: Callable[..., Any], *given: object, **named: object) -> Any:
        """Call something with the stash in the place of parameters and buffers; what is assigned there lands in it."""
        if not stash:
            return call(*given, **named)
        return functional_call(self._modules, stash, (partial(call, *given, **named),), tie_weights=False)

    def gradients(
        self, stash: Stash, h: Tensor, g: Tensor, leaves: Sequence[Tensor], x: Bundle = (), *, keep: bool = False
    ) -> tuple[Sequence[Tensor | None], Bundle]:
        """Of ``leaves`` and of ``x`` under the gradient ``g`` of ``h``; ``keep``: the graph is needed once more."""
        wanted, grad = [*leaves, *differentiable(x)], torch.autograd.grad
        found = self.within(stash, grad, [h], wanted, [g], allow_unused=True, retain_graph=keep) if wanted else ()
        of_x = iter(found[len(leaves) :])
        return found[: len(leaves)], tuple(next(of_x) if is_differentiable(tensor) else None for tensor in x)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers under the unsplit model's names: ``<layer>.<name>``."""
        if self._whole is not None:
            return self._whole.state_dict(keep_vars=True)
        return {
            layer.full(name): tensor
            for layer in self.layers
            for name, tensor in layer.module.state_dict(keep_vars=True).items()
        }

    def state(self) -> State:
        return module_state(self._modules)

    def load_state(self, state: State) -> None:
        load_module(self._modules, state)

    @contextlib.contextmanager
    def naming(self, layer: str | None, batch: int) -> Iterator[None]:
        """Around work on a batch: whatever it raises becomes a ``StageError`` that names stage, layer and batch."""
        try:
            yield
        except StageError:
            raise
        except Exception as error:
            raise StageError(said(error), stage=self._index, layer=layer, batch=batch) from error

    def _run_layers(self, batch: int, seeded: int | None, enter: _Entrance | None, *x: Tensor | None) -> Any:
        """One by one, or in one call where they are compiled, seeded like the first of them; ``seeded`` None: not."""
        calls: list[tuple[str | None, int, Callable[[Any], Any]]]
        calls = [(layer.name, layer.index, layer.module) for layer in self.layers]
        if self.compiled is not None:
            calls = [(None, self.layers[0].index, self.compiled)]
        value: Any = as_value(x)
        if self._whole is not None:
            return self._run_whole(self._whole, batch, seeded, value)
        for name, index, call in calls:
            if seeded is not None:
                seed_layer(self._plan.seed, index, seeded)
            called, enter = enter or call, None
            with self.naming(name, batch):
                value = called(value)
        return value

    def _run_whole(self, whole: Segment, batch: int, seeded: int | None, value: Any) -> Any:
        """All parts in one call of the model's forward."""
        at = self.layers[0]

        def enter(index: int) -> None:
            nonlocal at
            at = self.layers[index - self.layers[0].index]
            if seeded is not None:
                seed_layer(self._plan.seed, index, seeded)

        try:
            return whole.run(value, enter)
        except Exception as error:
            with self.naming(at.name, batch):
                raise error

    def _bundle(self, value: Any, *, training: bool) -> Bundle:
        if training not in self._outlets:
            self._outlets[training] = None if is_bundle(value) else Nesting.of(value)
        return as_bundle(value)


class _Modules(nn.ModuleList):
    """The layers of a stage as one module, within which anything can be called (``functional_call`` calls modules)."""

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def _stashed(tensor: Tensor) -> Tensor:
    """A copy that stands for a parameter or buffer in one batch, with the hooks on its gradient."""
    copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    for hook in (tensor._backward_hooks or {}).values():
        copy.register_hook(hook)
    for hook in (tensor._post_accumulate_grad_hooks or {}).values():
        copy.register_post_accumulate_grad_hook(hook)
    return copy
