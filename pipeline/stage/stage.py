"""A stage: a consecutive group of layers, its optimizer and the DNI of the cut above it. It knows how, not when.

What happens to one batch, unlocked, in a stage that is neither first nor last:

    x (from below) -> forward -> h  sent down the pipeline at once
    s = DNI(h, y)  -> backward -> dL/dW, dL/dx      dL/dx = J^T s is sent to the stage below under `bootstrap`
                   -> step
    g (from above) -> learn: DNI(h, y) -> g;        J^T g is sent to the stage below under `true` and `mixed`

The relay J^T g comes after the weights have been stepped in place, which autograd rightly refuses. A stage that will
relay therefore runs the forward pass on a copy of its weights and buffers (they are *stashed*, one copy per batch in
flight) and keeps that graph; the gradients found there are applied to the real weights. The copies are in the place of
the weights during its backward passes too: a layer that is computed anew there (activation checkpointing) is computed
on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.data.recipe import Recipe
from pipeline.dni.dni import DNI, build_dni, training_window
from pipeline.dni.local_loss import LocalLoss
from pipeline.dni.row_window import on_rows
from pipeline.errors import StageError
from pipeline.metrics.spans import Recorder, Span, silent
from pipeline.model.checkpointing import checkpoints_reentrantly
from pipeline.model.compute import ComputeContext
from pipeline.model.cut import Cut
from pipeline.model.given_model import ModuleModes
from pipeline.model.optimizers import build_optimizer
from pipeline.model.partition import Layer
from pipeline.model.unwritten import Unwritten
from pipeline.plan.device_choice import CPU
from pipeline.plan.plan import Plan
from pipeline.seeding import seed_layer
from pipeline.stage.divergence import Guard
from pipeline.stage.dni_quality import Quality, Sample, Samples
from pipeline.stage.evaluation import EvaluationMetrics
from pipeline.stage.gradient_flow import FREE, Flow, Locks
from pipeline.stage.unlock import Lock, Switch
from pipeline.wording import said

__all__ = ["Stage"]


@dataclass(slots=True)
class _Kept:
    """What a stage keeps of a batch between its forward and its last use."""

    x: Tensor  # the input the graph hangs on, or of the input what the stage below wants a gradient for
    h: Tensor  # the output, with its graph until the backward pass is over
    labels: Tensor
    samples: slice  # of x.grad: what the stage below wants
    leaves: list[Tensor]  # what the gradients are taken for: the parameters, or their stashed copies
    stash: dict[str, Tensor] = field(default_factory=dict)  # parameters and buffers of the forward pass, if not today's
    below: list[Tensor] = field(default_factory=list)  # the gradient of x, with the strides that autograd gave it
    synthetic: Tensor | None = None
    loss: float = float("nan")
    locks: Locks = FREE


@dataclass
class Stage:
    """One stage.

    Args:
        layers: its layers, in order, already initialised.
        index: 0 is the stage that sees the data.
        plan: the plan of the run.
        recipe: gives the loss.
        cut: what is known of the cut above; None for the last stage and in locked modes (no DNI is built then).
        below: what is known of the cut below; None for the first stage.
        record: told what the stage turns to.
        device: where it computes; what it is given is brought there.
    """

    layers: Sequence[Layer]
    index: int
    plan: Plan
    recipe: Recipe
    cut: Cut | None = None
    below: Cut | None = None
    record: Recorder = silent
    device: str = CPU
    dni: DNI | None = field(init=False, default=None)
    local: LocalLoss | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._flow = Flow(self.plan, self.index)
        self.last = self._flow.last
        self._computing = ComputeContext(self.plan, self.device)
        self._modules = self._computing.placed(_Modules(layer.module for layer in self.layers))
        self._chain = self._computing.chain([layer.module for layer in self.layers])
        self._parameters = [p for p in self._modules.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.plan.optimizer, self._parameters, self.plan.steps)
        if self.cut is not None and self._flow.mode.gradient == "synthetic":
            self.dni = self._computing.placed(build_dni(self.cut, self.plan.dni, self.plan.seed))
        if self.cut is not None and self._flow.mode.gradient == "local":
            self.local = self._computing.placed(LocalLoss(self.cut, self.plan.dni, self.plan.seed))
        self._modes = ModuleModes(self._modules)
        self._window = None
        if self.below is not None and self._flow.window_suffices:
            window = training_window(self.below, self.plan.dni, self.plan.seed)
            self._window = None if window.whole else window
        self._layers_forward, self._layers_evaluate = Unwritten(self._run_layers), Unwritten(self._evaluate_layers)
        self._needs_input_gradient: bool | None = None  # what is checkpointed reentrantly learns nothing without it
        self._restrides_gradient: bool | None = None  # autograd gives it other strides than it gets in x.grad
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._samples = Samples()
        self._true_gradient: Tensor | None = None
        self.scores = EvaluationMetrics()
        self._guard = Guard(self.plan, self.index, self.layers, self.cut, self._computing)
        self._lock = Lock(self.plan, self.index)

    # ------------------------------------------------------------------ one training batch

    def forward(self, batch: int, x: Tensor, labels: Tensor, microbatch: int = 0, *, awaited: bool = False) -> Tensor:
        """Compute the stage's output for a training batch and keep what the backward pass needs.

        Whether the stage is locked for this batch is decided here (``pipeline.stage.unlock``).

        Args:
            batch: batch id; with the seed and the layer it fixes every random number.
            x: [rows, ...] output of the stage below, or the inputs.
            labels: [rows, ...].
            microbatch: which part of the batch.
            awaited: the stage below is locked and waits for the gradient of the whole batch.

        Returns:
            [rows, ...] the output, detached.

        Raises:
            StageError: a layer failed; it is named.
        """
        self.record(Span.FORWARD, batch)
        self._modes.switch(True)
        x, labels = self._computing.here(x.detach(), labels)
        locks = Locks(self._lock.decide(batch), awaited)
        stash = self._flow.stashes(batch, locks)
        leaf, samples, enter = self._entrance(batch, x, whole=awaited, plain=stash)
        sampled = self._flow.samples(batch) and self.index > 0
        wanted = sampled or self._flow.at_update(batch, locks) or self._flow.relays(batch, locks)
        needed = self.index > 0 and self._needs_input_gradient is not False
        if x.is_floating_point() and (wanted or needed):
            leaf.requires_grad_()
        seeded = batch * self.plan.microbatches + microbatch
        copies = self._copies() if stash else {}
        h = self._run(seeded, x, copies, enter)
        if self._needs_input_gradient is None:
            self._needs_input_gradient = checkpoints_reentrantly(h)
        self._guard.activation(batch, seeded, x, h.detach())
        leaves = self._leaves(copies)
        self._kept[batch, microbatch] = kept = _Kept(leaf, h, labels, samples, leaves, copies, locks=locks)
        if leaf.requires_grad and self._restrides_gradient is not False:
            leaf.register_hook(kept.below.append)
        return h.detach()

    def predict(self, batch: int) -> Tensor | None:
        """The synthetic (or local) gradient of the batch; None in the last stage, which has the loss."""
        if self.last:
            return None
        self.record(Span.DNI, batch)
        kept, source = self._kept_of(batch), self.dni or self.local
        assert source is not None, "a stage that updates at once has something to update from"
        try:
            kept.synthetic = source.meet(kept.h.detach(), kept.labels, batch)
        except Exception as error:
            raise self._error(error, "DNI" if self.dni else None, batch) from error
        return kept.synthetic

    def locked(self, batch: int) -> bool:
        """Whether a batch that the stage still keeps something of came in while the stage was locked."""
        kept = self._kept.get((batch, 0))
        return kept is not None and kept.locks.mine

    def awaited(self, batch: int, microbatch: int = 0) -> bool:
        """Whether the stage below waits for the gradient of an open batch."""
        return self._flow.awaited(self._kept_of(batch, microbatch).locks)

    def keeps(self, batch: int, microbatch: int = 0) -> bool:
        """Whether the stage still has a use for a gradient of this batch."""
        return (batch, microbatch) in self._kept

    def relaying(self) -> list[int]:
        """The batches whose true gradient is still to be taken through this stage."""
        return [batch for (batch, _), kept in self._kept.items() if self._flow.relays(batch, kept.locks)]

    def forget(self, before: int) -> None:
        """Keep nothing of batches older than ``before``: the targets that have not come yet were dropped."""
        for key in [key for key in self._kept if key[0] < before]:
            del self._kept[key]

    def switched(self) -> Switch | None:
        """How the stage has just locked or unlocked, if it has; gives it once."""
        return self._lock.switched()

    def backward(self, batch: int, gradient: Tensor | None, microbatch: int = 0) -> Tensor | None:
        """Backpropagate ``gradient`` (None: the loss) through the stage; add to its parameters' ``.grad``.

        The loss of one of n microbatches counts 1/n, so that the parts add up to the mean over the batch.

        Returns:
            What the stage below is to get now: dL/dx of the samples its DNI trains on (``Window``; all of them in modes
            without DNIs), or None when nothing is sent at this point (first stage; targets ``true`` and ``mixed`` below
            the last stage; not a batch whose target flows).
        """
        self.record(Span.BACKWARD, batch)
        self._modes.switch(True)  # held-out batches may have come since: computed anew means as in training
        kept = self._kept_of(batch, microbatch)
        try:
            output = kept.h
            if gradient is not None:
                (gradient,) = self._computing.here(gradient)
            if self.last:
                with self._computing.autocast():
                    output = self.recipe.careful_loss(kept.h, kept.labels) / self.plan.microbatches
                kept.loss = float(output.detach())
                self._guard.loss(batch, kept.loss * self.plan.microbatches)
            elif gradient is not None and self._flow.updates_from_true(kept.locks):
                self._guard.true_gradient(batch, gradient)
            relays_later, sampled = self._flow.relays(batch, kept.locks), self._flow.samples(batch)
            sends_now = kept.x.requires_grad and self._flow.at_update(batch, kept.locks)
            if microbatch == 0 and self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
            inputs = kept.leaves if relays_later else None  # the gradient of x comes later, in learn
            if output.requires_grad and inputs != []:
                again = relays_later or sampled
                self._with(kept.stash, torch.autograd.backward, output, gradient, retain_graph=again, inputs=inputs)
        except StageError:
            raise
        except Exception as error:
            raise self._error(error, None, batch) from error
        below = self._input_gradient(kept)
        if kept.stash:
            self._take_gradients(kept.leaves)
        self._guard.gradients(batch, below)
        if sampled:
            self._keep_for_judgement(batch, kept, below)
        self._keep_for_target(batch, microbatch, relays_later)
        if not sends_now:
            return None
        return (below if below is not None else torch.zeros_like(kept.x))[kept.samples]

    def step(self, batch: int) -> None:
        """Step the optimizer with the gradients that ``backward`` left.

        They are dropped only by the next batch's ``backward``, which takes their memory over while it is still there:
        dropped here, it goes back to the system and the next backward pass takes a tenth longer.
        """
        self.record(Span.STEP, batch)
        if self.optimizer is not None:
            self.optimizer.step()

    def updates(self, batch: int) -> bool:
        """Whether this stage updates from this batch."""
        return self._flow.updates(batch)

    def skip(self, batch: int) -> None:
        """End a batch without an update; what its target will need is kept.

        Recorded like a backward pass and a step, of hardly any length, so that every batch has an end.
        """
        self.record(Span.BACKWARD, batch)
        kept = self._kept_of(batch)
        if self.last:
            with self._computing.autocast():
                kept.loss = float(self.recipe.careful_loss(kept.h.detach(), kept.labels))
            self._guard.loss(batch, kept.loss)
        elif self._flow.relays(batch) and self.plan.targets == "mixed":
            kept.synthetic = self.predict(batch)
        self._keep_for_target(batch, 0, self._flow.relays(batch))
        self.record(Span.STEP, batch)

    def learn(self, batch: int, gradient: Tensor) -> Tensor | None:
        """Train the DNI on a target, and relay it. Targets may come in any order.

        Args:
            batch: its batch id; what was kept of it goes.
            gradient: like the stage's output, or its samples that ``dni`` trains on where nothing is relayed.

        Returns:
            What the stage below is to get: J^T g (``true``), J^T (lambda g + (1 - lambda) s) (``mixed``; BP(lambda),
            Pemberton et al. 2021, section 2), or None when nothing is relayed.

        Raises:
            StageError: nothing is kept of the batch: its target came twice, or was said to be dropped.
        """
        kept = self._kept_of(batch)
        del self._kept[batch, 0]
        assert self.dni is not None, "a stage without a DNI keeps nothing for a target"
        self.record(Span.DNI_TRAIN, batch)
        (gradient,) = self._computing.here(gradient)
        try:
            if self._flow.true_targets and not kept.locks.mine:
                self._guard.true_gradient(batch, gradient)
            self._guard.target(batch, self.dni, kept.h.detach(), kept.labels, gradient)
            self.dni.learn(kept.h.detach(), kept.labels, gradient, batch)
        except StageError:
            raise
        except Exception as error:
            raise self._error(error, "DNI", batch) from error
        if not self._flow.relays(batch, kept.locks):
            return None
        self.record(Span.RELAY, batch)
        self._modes.switch(True)
        if self.plan.targets == "mixed":
            assert kept.synthetic is not None
            gradient = torch.lerp(kept.synthetic, gradient, self.plan.mix)
        keep = self._flow.samples(batch)
        (relayed,) = self._gradients(kept.stash, kept.h, [kept.x], gradient, keep)
        self._guard.gradient_below(batch, relayed)
        return (relayed if relayed is not None else torch.zeros_like(kept.x))[kept.samples]

    def true_gradient(self) -> Tensor | None:
        """Last stage: the input gradient of the whole batch that was just updated, if it is sampled; gives it once."""
        gradient, self._true_gradient = self._true_gradient, None
        return gradient

    def judge(self, batch: int, gradient: Tensor) -> tuple[Quality, Tensor | None]:
        """Compare the synthetic gradient of a sampled batch with the true one.

        Args:
            batch: its batch id.
            gradient: the true gradient, like the stage's output.

        Returns:
            The quality, and the true gradient of the stage below; None in the first stage.

        Raises:
            StageError: the stage keeps no such sample.
        """
        self.record(Span.QUALITY, batch)
        if batch not in self._samples:
            raise self._out_of_place(batch, "the true gradient of a sampled batch")
        self._modes.switch(True)
        (gradient,) = self._computing.here(gradient)
        quality, below = self._samples.judge(batch, gradient)
        self._lock.judged(quality)
        return quality, below

    def loss_of(self, batch: int) -> float:
        """The training loss of a batch whose backward is done, once; last stage only."""
        return sum(self._kept.pop((batch, part)).loss for part in range(self.plan.microbatches))

    # ------------------------------------------------------------------ held-out batches

    @torch.no_grad()
    def evaluate(self, batch: int, x: Tensor, labels: Tensor) -> Tensor:
        """Forward a held-out batch in evaluation mode; the last stage adds to ``scores``."""
        self.record(Span.EVALUATE, batch)
        self._modes.switch(False)
        x, labels = self._computing.here(x, labels)
        with self._computing.autocast():
            h = self._layers_evaluate(x, batch)
            if self.last:
                self.scores.add(self.recipe, h, labels)
        return h

    # ------------------------------------------------------------------ state

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers under the unsplit model's names: ``<layer>.<name>``."""
        return {
            f"{layer.name}.{name}": tensor
            for layer in self.layers
            for name, tensor in layer.module.state_dict(keep_vars=True).items()
        }

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state: ``<parameter name>.<key>``, e.g. ``0.weight.exp_avg``."""
        if self.optimizer is None:
            return {}
        names = {id(tensor): name for name, tensor in reversed(self.state_tensors().items())}  # tied: the first
        return {
            f"{names[id(parameter)]}.{key}": torch.as_tensor(value)
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
            if value is not None
        }

    # ------------------------------------------------------------------ private

    def _entrance(
        self, batch: int, x: Tensor, *, whole: bool, plain: bool
    ) -> tuple[Tensor, slice, Callable[[Tensor], Tensor] | None]:
        """The leaf whose gradient the stage below gets, which samples of it, and what stands for the first layer."""
        if self._window is None or whole:
            return x, slice(None), None
        samples = self._window.of(batch)
        leaf = x[samples]
        plain = plain or self._flow.samples(batch) or self._computing.autocasts or self._chain is not None
        enter = None if plain else on_rows(self.layers[0].module, leaf, samples)
        return (x, samples, None) if enter is None else (leaf, slice(None), enter)

    def _run(
        self, batch: int, x: Tensor, copies: dict[str, Tensor], enter: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """The layers in order, ``enter`` standing for the first one, on ``copies`` of their weights where there are."""
        with self._computing.autocast():
            h: Tensor = self._with(copies, self._layers_forward, x, batch, enter)
        if copies:
            with torch.no_grad():
                for name, buffer in self._modules.named_buffers():
                    buffer.copy_(copies[name])
        return h

    def _run_layers(self, h: Tensor, batch: int, enter: Callable[[Tensor], Tensor] | None) -> Tensor:
        """One by one; in one call where they are compiled, which is seeded like the first of them."""
        if self._chain is not None:
            seed_layer(self.plan.seed, self.layers[0].index, batch)
            try:
                return self._chain(h)
            except Exception as error:
                raise self._error(error, None, batch) from error
        for layer in self.layers:
            seed_layer(self.plan.seed, layer.index, batch)
            call, enter = enter or layer.module, None
            try:
                h = call(h)
            except Exception as error:
                raise self._error(error, layer.name, batch) from error
        return h

    def _evaluate_layers(self, h: Tensor, batch: int) -> Tensor:
        for name, call in self._calls():
            try:
                h = call(h)
            except Exception as error:
                raise self._error(error, name, batch) from error
        return h

    def _with(self, stash: dict[str, Tensor], call: Callable[..., Any], *given: object, **named: object) -> Any:
        """Call something with the stash in the place of parameters and buffers; whatever replaces one there goes in."""
        if not stash:
            return call(*given, **named)
        return functional_call(self._modules, stash, (partial(call, *given, **named),), tie_weights=False)

    def _gradients(
        self, stash: dict[str, Tensor], h: Tensor, wanted: Sequence[Tensor], g: Tensor, keep: bool
    ) -> tuple[Tensor | None, ...]:
        """Of ``h`` under ``g``, for ``wanted``; the graph is kept on demand."""
        if not wanted:
            return ()
        found: tuple[Tensor | None, ...] = self._with(
            stash, torch.autograd.grad, h, wanted, g, allow_unused=True, retain_graph=keep
        )
        return found

    def _input_gradient(self, kept: _Kept) -> Tensor | None:
        """What a backward pass found for x, as autograd gave it: ``x.grad`` is laid out as x is, and kernels round by
        strides. Only the first batch, and those of a stage where it matters, are looked at.
        """
        below, kept.x.grad = kept.x.grad, None
        if below is not None and kept.below:
            natural = kept.below.pop()
            if self._restrides_gradient is None:
                self._restrides_gradient = natural.stride() != below.stride()
            below = natural
        return below

    def _calls(self) -> list[tuple[str | None, Callable[[Tensor], Tensor]]]:
        """What a held-out batch goes through, and the layer's name where it is one."""
        return [(None, self._chain)] if self._chain else [(layer.name, layer.module) for layer in self.layers]

    def _take_gradients(self, copies: Sequence[Tensor]) -> None:
        """Gradients found on stashed copies of the weights are applied to the weights of today."""
        for parameter, copied in zip(self._parameters, copies, strict=True):
            parameter.grad, copied.grad = copied.grad, None

    def _copies(self) -> dict[str, Tensor]:
        """A copy of every parameter and buffer by its name, once for each module: tied ones stay tied."""
        copies: dict[int, Tensor] = {}
        named = [
            (f"{prefix}.{name}", tensor)
            for prefix, module in self._modules.named_modules()
            for tensors in (module.named_parameters, module.named_buffers)
            for name, tensor in tensors(recurse=False, remove_duplicate=False)
        ]
        return {name: copies.setdefault(id(tensor), _stashed(tensor)) for name, tensor in named}

    def _leaves(self, copies: dict[str, Tensor]) -> list[Tensor]:
        """What the gradients are taken for, like ``_parameters``."""
        if not copies:
            return list(self._parameters)
        names = dict(self._modules.named_parameters())
        return [copies[name] for name, parameter in names.items() if parameter.requires_grad]

    def _keep_for_judgement(self, batch: int, kept: _Kept, below: Tensor | None) -> None:
        if self.last:
            self._true_gradient = below if below is not None else torch.zeros_like(kept.x)
            return
        assert kept.synthetic is not None, "a stage below the last one updates from its DNI"
        clips = self.plan.optimizer.clip is not None  # in place, before the step: these are compared unclipped
        gradients = [p.grad.clone() if clips and p.grad is not None else p.grad for p in self._parameters]
        under_s = None if kept.locks.mine else gradients  # a locked stage has those under the gradient from above
        x = kept.x if self.index > 0 else None
        grad = partial(self._gradients, kept.stash)
        self._samples.keep(batch, Sample(x, kept.h, kept.leaves, kept.synthetic, under_s, grad))

    def _keep_for_target(self, batch: int, microbatch: int, relays_later: bool) -> None:
        """Keep of a batch only what is still needed: the loss, h and the labels, the graph too, or nothing."""
        if self.last:
            return
        if not self._flow.wants_target(batch, self._kept[batch, microbatch].locks):
            del self._kept[batch, microbatch]
        elif not relays_later:
            kept = self._kept[batch, microbatch]
            kept.h, kept.x, kept.leaves, kept.synthetic = kept.h.detach(), kept.h.detach(), [], None
            kept.stash = {}

    def _kept_of(self, batch: int, microbatch: int = 0) -> _Kept:
        if (batch, microbatch) not in self._kept:
            raise self._out_of_place(batch, f"something for microbatch {microbatch}")
        return self._kept[batch, microbatch]

    def _out_of_place(self, batch: int, what: str) -> StageError:
        what = f"{what} came, of which nothing is kept: it came twice, or too late"
        return StageError(what, stage=self.index, batch=batch)

    def _error(self, error: Exception, layer: str | None, batch: int) -> StageError:
        if isinstance(error, StageError):
            return error
        return StageError(said(error), stage=self.index, layer=layer, batch=batch)


class _Modules(nn.ModuleList):
    """The layers of a stage as one module, within which anything can be called (``functional_call`` calls modules)."""

    def forward(self, call: Callable[[], Any]) -> Any:
        """Call it."""
        return call()


def _stashed(tensor: Tensor) -> Tensor:
    """A copy that stands for a parameter or buffer in one batch, with the hooks on its gradient."""
    copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    for hook in (tensor._backward_hooks or {}).values():
        copy.register_hook(hook)
    for hook in (tensor._post_accumulate_grad_hooks or {}).values():
        copy.register_post_accumulate_grad_hook(hook)
    return copy
