"""A stage: consecutive layers, their optimizer and the DNI of the cut above. It is told what to do when.

One batch, unlocked, in a stage that is neither first nor last:

    x (from below) -> forward -> h  sent down the pipeline at once
    s = DNI(h, y)  -> backward -> dL/dW, dL/dx      dL/dx = J^T s is sent to the stage below under `bootstrap`
                   -> step
    g (from above) -> learn: DNI(h, y) -> g;        J^T g is sent to the stage below under `true` and `mixed`

The relay J^T g comes after the weights were stepped in place, where autograd refuses a backward pass. So a stage that
will relay runs its forward pass on stashed copies of its weights (``pipeline.stage.layers``), and keeps that graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.recipe import Recipe
from pipeline.dni.dni import DNI
from pipeline.messages.bundle import Bundle, Item, as_value, detached, differentiable, gradients_like
from pipeline.metrics.spans import Recorder, Span, silent
from pipeline.model.compute import ComputeContext
from pipeline.model.cut import Cut
from pipeline.model.optimizers import build_optimizer, optimizer_tensors
from pipeline.model.partition import Layer
from pipeline.plan.device_choice import CPU
from pipeline.plan.plan import Plan
from pipeline.stage.divergence import Guard
from pipeline.stage.dni_quality import Quality
from pipeline.stage.entrance import Entrance
from pipeline.stage.evaluation import EvaluationMetrics
from pipeline.stage.gradient_flow import Flow, Locks
from pipeline.stage.in_flight import InFlight, Kept
from pipeline.stage.layers import StageLayers
from pipeline.stage.predictor import Predictor
from pipeline.stage.unlock import Lock, Switch
from pipeline.state import State, Stateful, plain

__all__ = ["Stage"]


@dataclass
class Stage:
    """One stage."""

    layers: Sequence[Layer]  # already initialised
    index: int
    plan: Plan
    recipe: Recipe
    cut: Cut | None = None  # the cut above; None for the last stage and in locked modes (no DNI is built then)
    below: Cut | None = None  # the cut below; None for the first stage
    record: Recorder = silent  # told what the stage turns to
    device: str = CPU  # where it computes; what it is given is brought there

    def __post_init__(self) -> None:
        self._flow = Flow(self.plan, self.index)
        self.last = self._flow.last
        self._computing = ComputeContext(self.plan, self.device)
        self._layers = StageLayers(self.layers, self.index, self.plan, self._computing)
        self.optimizer = build_optimizer(self.plan.optimizer, self._layers.parameters, self.plan.steps)
        self._entrance = Entrance(self.below, self.plan, self._flow, self._layers, self._computing)
        self.in_flight = InFlight(self.index)
        self._true_gradient: Bundle | None = None
        self.scores = EvaluationMetrics()
        self._guard = Guard(self.plan, self.index, self.layers, self._computing)
        self._lock = Lock(self.plan, self.index)
        self._predictor = Predictor(self.cut, self.plan, self._layers, self._computing, self._guard)

    @property
    def dni(self) -> DNI | None:
        """The DNI of the cut above, in the mode ``unlocked``."""
        return self._predictor.dni

    def forward(self, item: Item, x: Bundle, context: Bundle, *, awaited: bool = False) -> Bundle:
        """The stage's output for a training batch, detached; what the backward pass needs is kept.

        The batch's ``Route``, and whether the stage is locked for it, is decided here. ``awaited``: the stage below is
        locked and waits for the gradient of the whole batch.

        Raises:
            StageError: a layer failed; it is named.
        """
        batch = item.batch
        self.record(Span.FORWARD, batch)
        self._layers.training(True)
        x, context = self._computing.brought(x), self._computing.brought(context)
        route = self._flow.route(batch, Locks(self._lock.decide(batch), awaited))
        leaf, samples, enter = self._entrance.leaf(x, route, batch)
        seeded = batch * self.plan.microbatches + item.microbatch
        stash = self._layers.stash() if route.stashes else {}
        h = self._layers.forward(batch, seeded, x, stash, enter)
        output = detached(h)
        self._guard.activation(batch, seeded, x, output)
        kept = self.in_flight[item] = Kept(route, leaf, h, context, samples, self._layers.leaves(stash), stash)
        self._entrance.listen(kept)
        return output

    def predict(self, item: Item) -> Bundle | None:
        """The synthetic (or local) gradient of the batch; None in the last stage, which has the loss."""
        if self.last:
            return None
        self.record(Span.DNI, item.batch)
        kept = self.in_flight.of(item)
        with self._layers.naming("DNI" if self.dni else None, item.batch):
            return self._predictor.meet(kept, item.batch)

    def switched(self) -> Switch | None:
        """How the stage has just locked or unlocked, if it has; gives it once."""
        return self._lock.switched()

    def backward(self, item: Item, gradient: Bundle | None) -> Bundle | None:
        """Backpropagate ``gradient`` (None: the loss) through the stage; add to its parameters' ``.grad``.

        The loss of one of n microbatches counts 1/n, so that the parts add up to the mean over the batch.

        Returns:
            What the stage below gets now: dL/dx of the samples its DNI trains on (of all in modes without DNIs); None
            where nothing is sent at this point (``Route.sends_now``).
        """
        batch, kept = item.batch, self.in_flight.of(item)
        route = kept.route
        self.record(Span.BACKWARD, batch)
        self._layers.training(True)
        with self._layers.naming(None, batch):
            outputs, under = self._outputs(item, kept, gradient)
            if item.microbatch == 0 and self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
            inputs = kept.leaves if route.relays else None  # the gradient of x comes later, in learn
            if outputs and inputs != []:
                again, backward = route.relays or route.samples, torch.autograd.backward
                self._layers.within(kept.stash, backward, outputs, under, retain_graph=again, inputs=inputs)
        below = self._entrance.gradient(kept)
        if kept.stash:
            self._layers.take_gradients(kept.leaves)
        self._guard.gradients(batch, below)
        if route.samples:
            if self.last:
                self._true_gradient = gradients_like(below, kept.x)
            else:
                self._predictor.sample(kept, batch, first=self.index == 0)
        sends_now = route.sends_now and any(tensor.requires_grad for tensor in differentiable(kept.x))
        sent = gradients_like(below, kept.x, kept.samples) if sends_now else None
        if not self.last:
            self.in_flight.updated(item)
        return sent

    def step(self, batch: int) -> None:
        """Step the optimizer with the gradients that ``backward`` left; they are dropped by the next ``backward``.

        Dropped here, their memory would go back to the system, and the next backward pass take a tenth longer.
        """
        self.record(Span.STEP, batch)
        if self.optimizer is not None:
            self.optimizer.step()

    def skip(self, item: Item) -> None:
        """End a batch without an update, but recorded like one; what its target will need is kept."""
        self.record(Span.BACKWARD, item.batch)
        kept = self.in_flight.of(item)
        if self.last:
            with self._computing.autocast():
                kept.loss = float(self._loss(detached(kept.h), kept.context))
            self._guard.loss(item.batch, kept.loss)
        else:
            if kept.route.relays and self.plan.targets == "mixed":
                self.predict(item)
            self.in_flight.updated(item)
        self.record(Span.STEP, item.batch)

    def learn(self, item: Item, gradient: Bundle) -> Bundle | None:
        """Train the DNI on a target, and relay it. Targets may come in any order; what was kept of the batch goes.

        The gradient is like the stage's output; where nothing is relayed, of the samples that the DNI trains on alone.

        Returns:
            What the stage below gets: J^T g (``true``), J^T (lambda g + (1 - lambda) s) (``mixed``; BP(lambda),
            Pemberton et al. 2021, section 2), or None where nothing is relayed.

        Raises:
            StageError: nothing is kept of the batch: its target came twice, or was said to be dropped.
        """
        batch, kept = item.batch, self.in_flight.of(item)
        del self.in_flight[item]
        self.record(Span.DNI_TRAIN, batch)
        g = self._predictor.of(self._computing.brought(gradient))
        with self._layers.naming("DNI", batch):
            self._predictor.learn(kept, g, batch, is_true=self._flow.true_targets and not kept.route.locked)
        if not kept.route.relays:
            return None
        self.record(Span.RELAY, batch)
        self._layers.training(True)
        if self.plan.targets == "mixed":
            assert kept.synthetic is not None
            g = torch.lerp(kept.synthetic, g, self.plan.mix)
        h = self._predictor.output(kept)
        _, relayed = self._layers.gradients(kept.stash, h, g, [], kept.x, keep=kept.route.samples)
        self._guard.gradient_below(batch, relayed)
        return gradients_like(relayed, kept.x, kept.samples)

    def true_gradient(self) -> Bundle | None:
        """Last stage: the input gradient of the whole batch just updated from, if it is sampled; gives it once."""
        gradient, self._true_gradient = self._true_gradient, None
        return gradient

    def judge(self, batch: int, gradient: Bundle) -> tuple[Quality, Bundle | None]:
        """Compare the synthetic gradient of a sampled batch with the true one, and take that on for the stage below.

        Raises:
            StageError: the stage keeps no such sample.
        """
        self.record(Span.QUALITY, batch)
        if batch not in self._predictor.samples:
            raise self.in_flight.out_of_place(batch, "the true gradient of a sampled batch")
        self._layers.training(True)
        quality, below = self._predictor.judge(batch, self._computing.brought(gradient))
        self._lock.judged(quality)
        return quality, below

    def loss_of(self, batch: int) -> float:
        """The training loss of a batch whose backward is done, once; last stage only."""
        return sum(self.in_flight.pop(Item(batch, part)).loss for part in range(self.plan.microbatches))

    @torch.no_grad()
    def evaluate(self, batch: int, x: Bundle, context: Bundle) -> Bundle:
        """Forward a held-out batch in evaluation mode; the last stage adds to ``scores``."""
        self.record(Span.EVALUATE, batch)
        self._layers.training(False)
        x, context = self._computing.brought(x), self._computing.brought(context)
        h = self._layers.evaluate(batch, x)
        if self.last:
            with self._computing.autocast():
                self.scores.add(self.recipe, self._layers.value(h, training=False), as_value(context))
        return h

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers under the unsplit model's names: ``<layer>.<name>``."""
        return self._layers.tensors()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state: ``<parameter name>.<key>``, e.g. ``0.weight.exp_avg``."""
        return optimizer_tensors(self.optimizer, self.state_tensors())

    def state(self) -> State:
        """All that the stage remembers between two batches; random numbers follow from (seed, layer, batch)."""
        optimizer = None if self.optimizer is None else plain(self.optimizer.state_dict())
        return {"optimizer": optimizer} | {name: part.state() for name, part in self._parts().items()}

    def load_state(self, state: State) -> None:
        for name, part in self._parts().items():
            part.load_state(state[name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(plain(state["optimizer"]))

    def _parts(self) -> dict[str, Stateful]:
        return {"layers": self._layers, "predictor": self._predictor, "guard": self._guard, "lock": self._lock}

    def _outputs(self, item: Item, kept: Kept, gradient: Bundle | None) -> tuple[list[Tensor], list[Tensor] | None]:
        """What is backpropagated, and under which gradients."""
        if self.last:
            with self._computing.autocast():
                loss = self._loss(kept.h, kept.context) / self.plan.microbatches
            kept.loss = float(loss.detach())
            self._guard.loss(item.batch, kept.loss * self.plan.microbatches)
            return ([loss] if loss.requires_grad else []), None
        assert gradient is not None, "a stage below the last one has no loss"
        gradient = self._computing.brought(gradient)
        if kept.route.from_true:
            self._guard.true_gradient(item.batch, gradient)
        pairs = zip(kept.h, gradient, strict=True)
        both = [(h, g) for h, g in pairs if h is not None and g is not None and h.requires_grad]
        return [h for h, _ in both], [g for _, g in both]

    def _loss(self, h: Bundle, context: Bundle) -> Tensor:
        return self.recipe.careful_loss(self._layers.value(h, training=True), as_value(context))
