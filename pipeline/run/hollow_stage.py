"""A stage without tensors: for the order of actions of a run, and for how long it would take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.plan.plan import Plan
from pipeline.stage.evaluation import EvaluationMetrics
from pipeline.stage.gradient_flow import Flow, Locks

__all__ = ["HollowStage"]


class HollowStage:
    """A stage that only says which gradients flow, as ``Stage`` would; its tensors are empty.

    It knows of a warm-up, but not of what ``unlock auto`` decides.
    """

    _EMPTY = torch.empty(0)

    def __init__(self, index: int, plan: Plan) -> None:
        self._flow = Flow(plan, index)
        self.index, self.last, self.scores = index, self._flow.last, EvaluationMetrics()
        self._updated = -1

    def updates(self, batch: int) -> bool:
        return self._flow.updates(batch)

    def locked(self, batch: int) -> bool:
        return self._flow.warms_up(batch) and not self.last

    def awaited(self, batch: int, microbatch: int = 0) -> bool:
        return self._flow.awaited(self._locks(batch))

    def keeps(self, batch: int, microbatch: int = 0) -> bool:
        return True

    def relaying(self) -> list[int]:
        return []

    def forget(self, before: int) -> None: ...

    def switched(self) -> None:
        return None

    def forward(self, batch: int, x: Any, labels: Any, microbatch: int = 0, *, awaited: bool = False) -> Tensor:
        return self._EMPTY

    def evaluate(self, batch: int, x: Any, labels: Any) -> Tensor:
        return self._EMPTY

    def predict(self, batch: int) -> Tensor | None:
        return None

    def backward(self, batch: int, gradient: Tensor | None, microbatch: int = 0) -> Tensor | None:
        self._updated = batch
        return self._EMPTY if self._flow.at_update(batch, self._locks(batch)) else None

    def step(self, batch: int) -> None: ...

    def skip(self, batch: int) -> None: ...

    def learn(self, batch: int, gradient: Tensor) -> Tensor | None:
        return self._EMPTY if self._flow.relays(batch, self._locks(batch)) else None

    def true_gradient(self) -> Tensor | None:
        return self._EMPTY if self.last and self._flow.samples(self._updated) else None

    def judge(self, batch: int, gradient: Tensor) -> tuple[None, Tensor]:
        return None, self._EMPTY

    def loss_of(self, batch: int) -> float:
        return float("nan")

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def _locks(self, batch: int) -> Locks:
        return Locks(mine=self.locked(batch), below=self._flow.warms_up(batch) and self.index > 0)
