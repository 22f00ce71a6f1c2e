"""A stage that sleeps instead of computing, a channel end that holds messages back: ``--emulate`` and ``--link``.

Everything else is real: processes, channels, policies, spans.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.messages.message import Message
from pipeline.metrics.spans import Recorder, Span
from pipeline.plan.emulation import Emulation, Link
from pipeline.plan.plan import Plan
from pipeline.stage.evaluation import EvaluationMetrics
from pipeline.stage.gradient_flow import Flow
from workers.channels.interface import Receiver
from workers.clock import now_ns

__all__ = ["DelayedReceiver", "EmulatedStage"]


class EmulatedStage:
    """Takes the time that was given, and sends tensors of the real shapes.

    Args:
        index: the stage.
        plan: its plan, with ``emulate``.
        emulation: the lengths.
        output_shape: shape of what the stage gives for a batch.
        record: told what the stage turns to.
    """

    def __init__(
        self, index: int, plan: Plan, emulation: Emulation, output_shape: tuple[int, ...], record: Recorder
    ) -> None:
        self._flow = Flow(plan, index)
        self.index, self.last, self.scores = index, self._flow.last, EvaluationMetrics()
        self._emulation, self._record = emulation, record
        self._part_ms = emulation.stage_ms / plan.microbatches
        self._microbatches = plan.microbatches
        self._output_shape = output_shape
        self._input_shapes: dict[tuple[int, int], torch.Size] = {}
        self._owed_ns = 0

    def locked(self, batch: int) -> bool:
        """Nothing is learned that a lock could be for."""
        return False

    def awaited(self, batch: int, microbatch: int = 0) -> bool:
        """Whether the stage below waits for the gradient."""
        return self._flow.awaited()

    def keeps(self, batch: int, microbatch: int = 0) -> bool:
        """Every gradient is welcome."""
        return True

    def relaying(self) -> list[int]:
        """Nothing is kept for a relay."""
        return []

    def forget(self, before: int) -> None:
        """Nothing is kept."""

    def switched(self) -> None:
        """Nor is there a switch."""

    def forward(self, batch: int, x: Tensor, labels: Tensor, microbatch: int = 0, *, awaited: bool = False) -> Tensor:
        """A third of the stage's time."""
        self._record(Span.FORWARD, batch)
        with self._lasting(self._part_ms / 3):
            self._input_shapes[batch, microbatch] = x.shape
            return torch.zeros(len(labels), *self._output_shape[1:])

    def predict(self, batch: int) -> Tensor | None:
        """Half of the DNI's time; nothing in the last stage."""
        if not self.last:
            self._record(Span.DNI, batch)
            with self._lasting(self._emulation.dni_ms / 2):
                return None
        return None

    def backward(self, batch: int, gradient: Tensor | None, microbatch: int = 0) -> Tensor | None:
        """Two thirds of the stage's time."""
        self._record(Span.BACKWARD, batch)
        with self._lasting(self._part_ms * 2 / 3):
            shape = self._input_shapes[batch, microbatch]
            if not self._flow.relays(batch):
                del self._input_shapes[batch, microbatch]
            return torch.zeros(shape) if self._flow.at_update(batch) else None

    def step(self, batch: int) -> None:
        """Part of the stage's time already."""
        self._record(Span.STEP, batch)

    def updates(self, batch: int) -> bool:
        """Whether the stage updates from this batch."""
        return self._flow.updates(batch)

    def skip(self, batch: int) -> None:
        """No time at all."""
        if not self._flow.relays(batch):
            del self._input_shapes[batch, 0]
        self._record(Span.STEP, batch)

    def learn(self, batch: int, gradient: Tensor) -> Tensor | None:
        """Half of the DNI's time, and a third of the stage's for a relay."""
        self._record(Span.DNI_TRAIN, batch)
        with self._lasting(self._emulation.dni_ms / 2):
            if not self._flow.relays(batch):
                return None
        self._record(Span.RELAY, batch)
        with self._lasting(self._part_ms / 3):
            return torch.zeros(self._input_shapes.pop((batch, 0)))

    def evaluate(self, batch: int, x: Tensor, labels: Tensor) -> Tensor:
        """Nothing is learned, so nothing is measured: passes on at once."""
        self._record(Span.EVALUATE, batch)
        return torch.zeros(len(labels), *self._output_shape[1:])

    def true_gradient(self) -> None:
        """Nothing is sampled."""

    def judge(self, batch: int, gradient: Tensor) -> tuple[None, None]:
        """Nothing is sampled."""
        return None, None

    def loss_of(self, batch: int) -> float:
        """There is none."""
        return 0.0

    def state_tensors(self) -> dict[str, Tensor]:
        """There are no weights."""
        return {}

    optimizer_tensors = state_tensors

    @contextlib.contextmanager
    def _lasting(self, milliseconds: float) -> Iterator[None]:
        """A block that lasts that long. What the system overslept is taken off the next, so that the sum is right."""
        begin, length_ns = now_ns(), round(milliseconds * 1e6) - self._owed_ns
        yield
        left_ns = length_ns - (now_ns() - begin)
        if left_ns > 0:
            time.sleep(left_ns * 1e-9)
        self._owed_ns = now_ns() - begin - length_ns


class DelayedReceiver:
    """Holds each message of a receiver back until it would have arrived over a link.

    Args:
        receiver: the real one; messages wait in its slots.
        link: the link.
    """

    def __init__(self, receiver: Receiver, link: Link) -> None:
        self._receiver, self._link = receiver, link
        self._waiting: Message | None = None
        self._free_ns = 0
        self.due_ns: int | None = None

    def poll(self) -> Message | None:
        """The next message in place, if it has arrived; ``due_ns`` says when the next one will, if that is known."""
        if self._waiting is None:
            self._waiting = self._receiver.poll()
            if self._waiting is None:
                self.due_ns = None
                return None
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._waiting.tensors)
            self.due_ns, self._free_ns = self._link.arrival_ns(self._waiting.sent_ns, self._free_ns, num_bytes)
        if self.due_ns is not None and now_ns() < self.due_ns:
            return None
        message, self._waiting, self.due_ns = self._waiting, None, None
        return message
