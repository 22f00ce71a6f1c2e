"""A stage without layers: for the order of actions of a run, for how long it would take, and for emulated runs.

It says which gradients flow, as ``Stage`` would, and passes on zeros of the shapes that it was told, or of no rows. It
knows of a warm-up, but not of what ``unlock auto`` decides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pipeline.messages.bundle import Bundle, Item, Specs, TensorSpec, gradients_like
from pipeline.metrics.spans import Recorder, Span, silent
from pipeline.plan.emulation import Emulation
from pipeline.plan.plan import Plan
from pipeline.stage.dni_quality import Quality
from pipeline.stage.evaluation import EvaluationMetrics
from pipeline.stage.gradient_flow import Flow
from pipeline.stage.in_flight import InFlight, Kept
from pipeline.stage.unlock import Switch

__all__ = ["HollowStage"]

_Block = Callable[[float], AbstractContextManager[object]]
_NOTHING = (TensorSpec("nothing", (0,), torch.float32, differentiable=True),)


class HollowStage:
    """What a Runner needs of a ``Stage``. It gives ``output`` for a batch.

    With ``emulate`` the plan says how long its work takes; ``lasting`` gives a block that lasts so many milliseconds.
    A forward takes a third of ``stage_ms``, a backward two, a relay one; predicting and learning half of ``dni_ms``.
    """

    def __init__(
        self, index: int, plan: Plan, output: Specs = _NOTHING, record: Recorder = silent, lasting: _Block = nullcontext
    ) -> None:
        self._flow, self._output, self._record = Flow(plan, index), output, record
        self.index, self.last, self.scores = index, self._flow.last, EvaluationMetrics()
        self.in_flight = InFlight(index)
        lengths = plan.emulation or Emulation(stage_ms=0.0)
        self._part_ms, self._dni_ms = lengths.stage_ms / plan.microbatches, lengths.dni_ms
        self._lasting, self._parts, self._sampled = lasting, plan.microbatches, False

    def switched(self) -> Switch | None:
        return None

    def forward(self, item: Item, x: Bundle, context: Bundle, *, awaited: bool = False) -> Bundle:
        self._record(Span.FORWARD, item.batch)
        with self._lasting(self._part_ms / 3):
            route = self._flow.route(item.batch, self._flow.warm_up(item.batch))
            h = self._zeros(context)
            self.in_flight[item] = Kept(route, x, h, context, slice(None), [], {})
            return h

    def predict(self, item: Item) -> Bundle | None:
        if not self.last:
            self._record(Span.DNI, item.batch)
            with self._lasting(self._dni_ms / 2):
                pass
        return None

    def backward(self, item: Item, gradient: Bundle | None) -> Bundle | None:
        self._record(Span.BACKWARD, item.batch)
        with self._lasting(self._part_ms * 2 / 3):
            kept = self.in_flight.of(item)
            self._sampled = kept.route.samples
            below = gradients_like((None,) * len(kept.x), kept.x) if kept.route.sends_now else None
            self._updated(item)
            return below

    def step(self, batch: int) -> None:
        self._record(Span.STEP, batch)

    def skip(self, item: Item) -> None:
        self._updated(item)
        self._record(Span.STEP, item.batch)

    def learn(self, item: Item, gradient: Bundle) -> Bundle | None:
        self._record(Span.DNI_TRAIN, item.batch)
        kept = self.in_flight.pop(item)
        with self._lasting(self._dni_ms / 2):
            if not kept.route.relays:
                return None
        self._record(Span.RELAY, item.batch)
        with self._lasting(self._part_ms / 3):
            return gradients_like((None,) * len(kept.x), kept.x)

    def evaluate(self, batch: int, x: Bundle, context: Bundle) -> Bundle:
        self._record(Span.EVALUATE, batch)
        return self._zeros(context)

    def true_gradient(self) -> Bundle | None:
        return (torch.empty(0),) if self.last and self._sampled else None

    def judge(self, batch: int, gradient: Bundle) -> tuple[Quality | None, Bundle | None]:
        return None, gradient

    def loss_of(self, batch: int) -> float:
        for part in range(self._parts):
            self.in_flight.pop(Item(batch, part), None)
        return 0.0

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    optimizer_tensors = state_tensors

    def _zeros(self, context: Bundle) -> Bundle:
        rows = len(next((tensor for tensor in context if tensor is not None), ()))
        return tuple(
            None if spec is None else torch.zeros(rows, *spec.shape[1:], dtype=spec.dtype) for spec in self._output
        )

    def _updated(self, item: Item) -> None:
        if not self.last:
            self.in_flight.updated(item)
