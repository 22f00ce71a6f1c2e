"""Guards: a run whose numbers are no longer finite, or run away, ends at the stage and batch where that began.

    forward    h finite?            else the first layer that makes it so is found by going through them once more
    backward   loss finite?         and not 10 times what it began with on average over 20 batches, nor 1,000 at once
               true gradient at h   not 10,000 times the largest of the first 10
    after it   gradients finite?    looked at before weights are touched and before anything is sent on
    learn      prediction against   not all zeros for 128 targets, nor |s - g|^2 above 4 |g|^2 over the last 256, when
               target, one in 16    512 have come: clipped as it is, a DNI whose scale fits cannot be so wrong. |g|^2
                                    counts as 1/10,000 of its largest median over 256 targets at least: what is learned
                                    by heart has no gradient left to be right about

What is not finite always ends the run, the rest is ``plan.guard``. Thresholds lie between runs that ended well and runs
that did not (docs/convergence.md). Only true gradients are held against their beginning: those that DNIs pass on to
each other grow from nothing by many orders of magnitude in runs that end well.

A batch costs one pass over the activation, and one over the gradients of biases and norms, where what is not finite in
a backward pass arrives; to look at every weight would cost a part of the optimizer's time.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.dni.dni import DNI
from pipeline.dni.forms import root_mean_square
from pipeline.dni.regressors import Custom
from pipeline.errors import StageError
from pipeline.messages.bundle import Bundle, as_bundle, as_value, differentiable, rows_in
from pipeline.model.compute import ComputeContext
from pipeline.model.partition import Layer
from pipeline.plan.plan import Plan
from pipeline.seeding import seed_layer
from pipeline.state import State, attributes, set_attributes

__all__ = ["Guard"]

_BEGINNING, _AVERAGED = 10, 20  # batches: what the loss began with, what it is now
_TIMES_THE_LOSS, _TIMES_AT_ONCE, _TIMES_THE_GRADIENT = 10.0, 1000.0, 1e4
_ONE_IN, _SILENT, _SAMPLES = 16, 8, 16  # targets: every 16th is looked at; 8 of these without a word; the last 16
_WORST_ERROR = 4.0
_NEXT_TO_NOTHING = 1e-4
_REMEMBERED = (
    *("_losses", "_first_losses", "_rising_since", "_first_sizes"),
    *("_num_targets", "_silent", "_errors", "_largest"),
)
_REGARDLESS = "--no-guard goes on regardless"
_SLOWER = "lower the learning rate, or clip (--optimizer.clip 1)"


class Guard:
    """Watches one stage. Whatever looks at something raises a ``StageError`` where the run has to end.

    ``computing`` is how its layers compute; None: as the plan says, on the CPU.
    """

    def __init__(
        self, plan: Plan, stage: int, layers: Sequence[Layer], computing: ComputeContext | None = None
    ) -> None:
        self._plan, self._stage, self._layers = plan, stage, layers
        self._computing = computing or ComputeContext(plan)
        self._named = [
            (layer.name, layer.full(name), parameter)
            for layer in layers
            for name, parameter in layer.module.named_parameters()
            if parameter.requires_grad
        ]
        thin = [parameter for _, _, parameter in self._named if parameter.dim() < 2]
        self._thin = thin or [parameter for _, _, parameter in self._named[:1]]
        self._losses: deque[float] = deque(maxlen=_AVERAGED)
        self._first_losses: list[float] = []
        self._rising_since: int | None = None
        self._first_sizes: list[float] = []
        self._num_targets = 0
        self._silent: list[int] = []
        self._errors: deque[tuple[int, float, float]] = deque(maxlen=_SAMPLES)
        self._largest = 0.0  # median of the squares of the last targets; later on one outlier does not move it

    def activation(self, batch: int, seeded: int, x: Bundle, h: Bundle) -> None:
        """Look at what a forward pass made of ``x``; the layer, ``seeded`` again, that made it not finite is named."""
        if not all(map(_finite, differentiable(h))):
            came_broken = not all(map(_finite, differentiable(x)))
            what = "what comes in" if came_broken else "the output"
            remedy = "look at the inputs of this batch, or lower the learning rate"
            layer = None if came_broken else self._first_layer(seeded, x)
            raise self._failed(batch, f"{what} is not finite: {remedy}", layer)

    def loss(self, batch: int, loss: float) -> None:
        """Look at the training loss of a batch, before its backward pass."""
        if not math.isfinite(loss):
            remedy = "lower the learning rate, or look at the inputs of this batch"
            raise self._failed(batch, f"the loss is {loss}: {remedy}")
        if not self._plan.guard:
            return
        self._losses.append(loss)
        if len(self._first_losses) < _BEGINNING:
            self._first_losses.append(loss)
            return
        start, now = (sum(losses) / len(losses) for losses in (self._first_losses, self._losses))
        if start <= 0:  # nothing to compare with
            return
        if now < 2 * start:
            self._rising_since = None
        elif self._rising_since is None:
            self._rising_since = batch
        if now > _TIMES_THE_LOSS * start or loss > _TIMES_AT_ONCE * start:
            since = "" if self._rising_since is None else f"; above twice that since batch {self._rising_since}"
            figures = f"{loss:.4g} in this batch, {now:.4g} on average over the last {len(self._losses)}, {start:.4g}"
            what = f"the loss runs away: {figures} in the first {_BEGINNING}{since}"
            raise self._failed(batch, f"{what}: {_SLOWER}; {_REGARDLESS}")

    def true_gradient(self, batch: int, gradient: Bundle) -> None:
        """Look at a true gradient at the stage's output, before it is used."""
        size = max((float(root_mean_square(each)) for each in differentiable(gradient)), default=0.0)
        if not math.isfinite(size):
            raise self._failed(batch, "the gradient from above is not finite: lower the learning rate")
        if not self._plan.guard:
            return
        if len(self._first_sizes) < _BEGINNING:
            self._first_sizes.append(size)
        elif (largest := max(self._first_sizes)) and size > _TIMES_THE_GRADIENT * largest:
            figures = f"{size:.3g}, in the first {_BEGINNING} at most {largest:.3g}"
            what = f"the gradient explodes: its root mean square at the cut above is {figures}"
            raise self._failed(batch, f"{what}: {_SLOWER}; {_REGARDLESS}")

    def gradients(self, batch: int, below: Bundle) -> None:
        """Look at what a backward pass gave, also for the input (``below``), before it is sent on or stepped with.

        The topmost layer with a gradient that is not finite is named: there it began.
        """
        found = [parameter.grad.sum() for parameter in self._thin if parameter.grad is not None]
        if found and not math.isfinite(float(torch.stack(found).sum())):
            for layer, name, parameter in reversed(self._named):
                if parameter.grad is not None and not _finite(parameter.grad):
                    what = f"the gradient of {name} is not finite; nothing was stepped with it"
                    raise self._failed(batch, f"{what}: lower the learning rate, or look at this layer", layer)
        self.gradient_below(batch, below)

    def gradient_below(self, batch: int, gradient: Bundle) -> None:
        """Look at a gradient before it is sent to the stage below."""
        if not all(map(_finite, differentiable(gradient))):
            raise self._failed(batch, "the gradient for the stage below is not finite: lower the learning rate")

    def target(self, batch: int, dni: DNI, h: Tensor, labels: Tensor, gradient: Tensor) -> None:
        """Look at a target, or at the part that the DNI trains on; hold the prediction against every 16th.

        A user's own module is not asked: that might change it.
        """
        self._num_targets += 1
        if not self._plan.guard or self._num_targets % _ONE_IN or isinstance(dni.form, Custom):
            return
        rows = dni.window.of(batch) if len(gradient) < len(h) else slice(None)
        predicted = dni.predict(h[rows], rows_in(labels, rows))
        size = float(gradient.square().sum())
        self._check_silence(batch, silent=size > 0 and not bool(predicted.any()))
        self._check_error(batch, float((predicted - gradient).square().sum()), size)

    def state(self) -> State:
        return attributes(self, _REMEMBERED)

    def load_state(self, state: State) -> None:
        set_attributes(self, _REMEMBERED, state)

    def _check_silence(self, batch: int, *, silent: bool) -> None:
        self._silent = [*self._silent, batch] if silent else []
        if len(self._silent) >= _SILENT:
            what = f"the DNI has predicted nothing but zeros since batch {self._silent[0]} or longer, while its targets"
            raise self._failed(batch, f"{what} are not zero; this stage learns nothing: {self._other_dni}", "DNI")

    def _check_error(self, batch: int, error: float, size: float) -> None:
        self._errors.append((batch, error, size))
        total, size = (sum(each[i] for each in self._errors) for i in (1, 2))
        self._largest = max(self._largest, statistics.median(each[2] for each in self._errors))
        most_allowed = _WORST_ERROR * max(size, _NEXT_TO_NOTHING * self._largest * len(self._errors))
        if self._num_targets > 2 * _SAMPLES * _ONE_IN and total > most_allowed:
            times = f"{total / size:.3g}" if size else "infinitely many"
            what = f"the DNI runs away: since batch {self._errors[0][0]} the error of its predictions is {times} times"
            of_what = "that of zeros (|s - g|^2 over |g|^2)"
            raise self._failed(batch, f"{what} {of_what}: {self._other_dni}", "DNI")

    @property
    def _other_dni(self) -> str:
        lr = self._plan.dni.lr / 10
        return f"lower its learning rate (--dni.lr {lr:g}), or choose another form (--dni.form); {_REGARDLESS}"

    @torch.no_grad()
    def _first_layer(self, seeded: int, x: Bundle) -> str | None:
        """The first layer whose output is not finite, if it is so again when run again with the same random numbers."""
        h: Any = as_value(tuple(None if tensor is None else tensor.clone() for tensor in x))
        for layer in self._layers:
            seed_layer(self._plan.seed, layer.index, seeded)
            with self._computing.autocast():
                h = layer.module(h)
            if not all(map(_finite, differentiable(as_bundle(h)))):
                return layer.name
        return None

    def _failed(self, batch: int, message: str, layer: str | None = None) -> StageError:
        """The error to raise; its cause tells it from a failure of the code."""
        error = StageError(f"FloatingPointError: {message}", stage=self._stage, layer=layer, batch=batch)
        error.__cause__ = FloatingPointError(message)
        return error


def _finite(values: Tensor) -> bool:
    """Whether every value is, in one pass without a copy. A sum too large for a number is not finite either."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return math.isfinite(float(values.detach().sum(dtype=wide)))
