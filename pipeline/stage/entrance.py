"""Where a batch enters a stage: the leaf whose gradient the stage below gets, and of which samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pipeline.dni.dni import training_window
from pipeline.dni.row_window import on_rows
from pipeline.messages.bundle import Bundle, differentiable, present
from pipeline.model.compute import ComputeContext
from pipeline.model.cut import Cut
from pipeline.plan.plan import Plan
from pipeline.stage.gradient_flow import Flow, Route
from pipeline.stage.in_flight import Kept
from pipeline.stage.layers import StageLayers

__all__ = ["Entrance"]


class Entrance:
    """The entrance of one stage.

    Where the stage below only trains its DNI on what it gets, it gets no more than the samples that this one trains on.
    """

    def __init__(
        self, below: Cut | None, plan: Plan, flow: Flow, layers: StageLayers, computing: ComputeContext
    ) -> None:
        self._layers, self._first, self._window = layers, flow.index == 0, None
        self._plain = computing.autocasts or layers.compiled is not None
        if below is not None and flow.window_suffices:
            window = training_window(below, plan.dni, plan.seed)
            self._window = None if window.whole else window
        self._restrides: bool | None = None  # autograd gives gradients other strides than they get in x.grad

    def leaf(self, x: Bundle, route: Route, batch: int) -> tuple[Bundle, slice, Callable[[Tensor], Tensor] | None]:
        """The leaf, the samples of its gradient that are wanted, and what stands for the first layer, if anything."""
        leaf, samples, enter = x, slice(None), None
        if self._window is not None and not route.awaited:
            samples = self._window.of(batch)
            if len(x) == 1 and not (self._plain or route.stashes or route.samples):
                rows = present(x[0])[samples]
                if (enter := on_rows(self._layers.layers[0].module, rows, samples)) is not None:
                    leaf, samples = (rows,), slice(None)
        wanted = route.sends_now or route.relays or (route.samples and not self._first)
        if wanted or self._layers.needs_input_gradient:
            for tensor in differentiable(leaf):
                tensor.requires_grad_()
        return leaf, samples, enter

    def listen(self, kept: Kept) -> None:
        """Note the gradients of the leaf as autograd gives them, where their strides may matter."""
        if self._restrides is not False:
            for place, tensor in enumerate(kept.x):
                if tensor is not None and tensor.requires_grad:
                    tensor.register_hook(partial(kept.natural.__setitem__, place))

    def gradient(self, kept: Kept) -> Bundle:
        """What a backward pass found for the leaf, as autograd gave it: ``x.grad`` is laid out as x is, and kernels
        round by strides. Looked at in the first batch, and where it matters.
        """
        found: list[Tensor | None] = []
        for place, tensor in enumerate(kept.x):
            below, natural = None, kept.natural.pop(place, None)
            if tensor is not None:
                below, tensor.grad = tensor.grad, None
            if below is not None and natural is not None:
                if self._restrides is None:
                    self._restrides = natural.stride() != below.stride()
                below = natural
            found.append(below)
        return tuple(found)
