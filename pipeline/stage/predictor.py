"""What a stage updates from before the true gradient comes: the DNI of the cut above it, or a loss of its own.

meet    at the update                        learn    when a target comes, true or bootstrapped
judge   when the true gradient of a sampled batch comes: how good was the prediction?
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pipeline.dni.dni import DNI, build_dni
from pipeline.dni.local_loss import LocalLoss
from pipeline.messages.bundle import Bundle, present
from pipeline.model.compute import ComputeContext
from pipeline.model.cut import Cut
from pipeline.plan.plan import Plan
from pipeline.schedule.modes import MODES
from pipeline.stage.divergence import Guard
from pipeline.stage.dni_quality import Quality, Sample
from pipeline.stage.in_flight import Kept
from pipeline.stage.layers import StageLayers
from pipeline.state import State

__all__ = ["Predictor"]


class Predictor:
    """Predicts the gradient of one tensor of a stage's output: the differentiable one. Without a cut above: nothing.

    Attributes:
        dni: in the mode ``unlocked``.
        local: in the mode ``local``.
        samples: the batches whose true gradients are still to come, to be compared.
    """

    def __init__(
        self, cut: Cut | None, plan: Plan, layers: StageLayers, computing: ComputeContext, guard: Guard
    ) -> None:
        self._plan, self._layers, self._guard = plan, layers, guard
        self.dni: DNI | None = None
        self.local: LocalLoss | None = None
        self.samples: dict[int, Sample] = {}
        self._place = 0 if cut is None else cut.specs.index(cut.activation)
        gradient = MODES[plan.mode].gradient
        if cut is not None and gradient == "synthetic":
            self.dni = computing.placed(build_dni(cut, plan.dni, plan.seed))
        if cut is not None and gradient == "local":
            self.local = computing.placed(LocalLoss(cut, plan.dni, plan.seed))

    def meet(self, kept: Kept, batch: int) -> Bundle:
        """The synthetic (or local) gradient of a batch that has just been computed; kept with it."""
        source = self.dni or self.local
        assert source is not None, "a stage that updates at once has something to update from"
        kept.synthetic = source.meet(self._activation(kept), kept.labels, batch)
        return tuple(kept.synthetic if place == self._place else None for place in range(len(kept.h)))

    def of(self, gradient: Bundle) -> Tensor:
        """The gradient of the tensor that is predicted for."""
        return present(gradient[self._place])

    def output(self, kept: Kept) -> Tensor:
        """The tensor that is predicted for, with its graph."""
        return present(kept.h[self._place])

    def learn(self, kept: Kept, g: Tensor, batch: int, *, is_true: bool) -> None:
        """Take a target; ``is_true``: it is the gradient of the loss, and held against its beginning."""
        assert self.dni is not None, "a stage without a DNI keeps nothing for a target"
        h, labels = self._activation(kept), kept.labels
        if is_true:
            self._guard.true_gradient(batch, (g,))
        self._guard.target(batch, self.dni, h, labels, g)
        self.dni.learn(h, labels, g, batch)

    def sample(self, kept: Kept, batch: int, *, first: bool) -> None:
        """Keep a batch after its update, to be judged; ``first``: no stage below wants its true gradient."""
        assert kept.synthetic is not None, "a stage below the last one updates from its DNI"
        parameters = self._layers.parameters
        clips = self._plan.optimizer.clip is not None  # in place, before the step: these are compared unclipped
        gradients = [p.grad.clone() if clips and p.grad is not None else p.grad for p in parameters]
        under_s = None if kept.route.locked else gradients  # a locked stage has those under the gradient from above
        x = () if first else kept.x
        grad = partial(self._layers.gradients, kept.stash)
        self.samples[batch] = Sample(x, self.output(kept), kept.leaves, kept.synthetic, under_s, grad)

    def judge(self, batch: int, gradient: Bundle) -> tuple[Quality, Bundle | None]:
        """Compare a kept sample with its true gradient; the latter's input gradient, where a stage below wants it."""
        return self.samples.pop(batch).judge(batch, self.of(gradient))

    def state(self) -> State:
        """That of the DNI, or of the local loss."""
        source = self.dni or self.local
        return {} if source is None else source.state()

    def load_state(self, state: State) -> None:
        """Take up ``state``."""
        if (source := self.dni or self.local) is not None:
            source.load_state(state)

    def _activation(self, kept: Kept) -> Tensor:
        return self.output(kept).detach()
