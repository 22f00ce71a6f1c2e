"""What a stage updates from before the true gradient comes: the DNI of the cut above it, or a loss of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pipeline.dni.dni import DNI, build_dni
from pipeline.dni.local_loss import LocalLoss
from pipeline.messages.bundle import Bundle, gradients_like, present
from pipeline.model.compute import ComputeContext
from pipeline.model.cut import Cut
from pipeline.plan.plan import Plan
from pipeline.schedule.modes import MODES
from pipeline.stage.divergence import Guard
from pipeline.stage.dni_quality import Quality, compare
from pipeline.stage.in_flight import Kept
from pipeline.stage.layers import StageLayers
from pipeline.state import State

__all__ = ["Predictor"]


class Predictor:
    """Predicts the gradient of one tensor of a stage's output: the differentiable one. Without a cut above: nothing."""

    def __init__(
        self, cut: Cut | None, plan: Plan, layers: StageLayers, computing: ComputeContext, guard: Guard
    ) -> None:
        self._plan, self._layers, self._guard = plan, layers, guard
        self._source: DNI | LocalLoss | None = None
        self.samples: dict[int, tuple[Kept, Sequence[Tensor | None] | None]] = {}  # each with its dL/dW, if taken
        self._place = 0 if cut is None else cut.specs.index(cut.activation)
        gradient = MODES[plan.mode].gradient
        if cut is not None and gradient == "synthetic":
            self._source = computing.placed(build_dni(cut, plan.dni, plan.seed))
        if cut is not None and gradient == "local":
            self._source = computing.placed(LocalLoss(cut, plan.dni, plan.seed))

    @property
    def dni(self) -> DNI | None:
        """That of the cut above, in the mode ``unlocked``."""
        return self._source if isinstance(self._source, DNI) else None

    def meet(self, kept: Kept, batch: int) -> Bundle:
        """The synthetic (or local) gradient of a batch that has just been computed; kept with it."""
        assert self._source is not None, "a stage that updates at once has something to update from"
        kept.synthetic = self._source.meet(self.output(kept).detach(), kept.labels, batch)
        return tuple(kept.synthetic if place == self._place else None for place in range(len(kept.h)))

    def of(self, gradient: Bundle) -> Tensor:
        """The gradient of the tensor that is predicted for."""
        return present(gradient[self._place])

    def output(self, kept: Kept) -> Tensor:
        """The tensor that is predicted for, with its graph."""
        return present(kept.h[self._place])

    def learn(self, kept: Kept, g: Tensor, batch: int, *, is_true: bool) -> None:
        """Take a target, true or bootstrapped; ``is_true``: it is the gradient of the loss."""
        dni, h, labels = self.dni, self.output(kept).detach(), kept.labels
        assert dni is not None, "a stage without a DNI keeps nothing for a target"
        if is_true:
            self._guard.true_gradient(batch, (g,))
        self._guard.target(batch, dni, h, labels, g)
        dni.learn(h, labels, g, batch)

    def sample(self, kept: Kept, batch: int, *, first: bool) -> None:
        """Keep a batch after its update, to be judged; ``first``: no stage below wants its true gradient."""
        parameters = self._layers.parameters
        clips = self._plan.optimizer.clip is not None  # in place, before the step: these are compared unclipped
        gradients = [p.grad.clone() if clips and p.grad is not None else p.grad for p in parameters]
        under_s = None if kept.route.locked else gradients  # a locked stage has those under the gradient from above
        self.samples[batch] = replace(kept, x=() if first else kept.x, context=()), under_s

    def judge(self, batch: int, gradient: Bundle) -> tuple[Quality, Bundle | None]:
        """Compare a kept sample with its true gradient; the latter's input gradient, where a stage below wants it."""
        kept, under_s = self.samples.pop(batch)
        h, s, g = self.output(kept), kept.synthetic, self.of(gradient)
        assert s is not None, "a stage below the last one updates from its DNI"
        if under_s is None:
            under_s, _ = self._layers.gradients(kept.stash, h, s, kept.leaves, keep=True)
        under_g, below = self._layers.gradients(kept.stash, h, g, kept.leaves, kept.x)
        quality = compare(batch, s, g, under_s or [s], under_g or [g])
        return quality, gradients_like(below, kept.x) if kept.x else None

    def state(self) -> State:
        return {} if self._source is None else self._source.state()

    def load_state(self, state: State) -> None:
        if self._source is not None:
            self._source.load_state(state)
