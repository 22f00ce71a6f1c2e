"""The user's loss, tried on batch 0 before anything starts: what it gives, what it learns, and how many rows it needs.

the model's last layers --gradient?--> output --loss--> one number with a gradient      else: refused, one sentence
loss: trainable tensors, state of its own                                               refused, by name
loss: in place on its arguments                                                         stages give it copies
loss: of fewer rows the same                                                            else: of whole batches only
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.dni.dni import describe_form, training_window
from pipeline.errors import PlanError
from pipeline.messages.bundle import as_bundle, as_value, differentiable, present, rows_in
from pipeline.messages.nesting import Nesting
from pipeline.model.autograd_graph import leaves_of
from pipeline.model.cut import Cut, MainOutput
from pipeline.model.given_model import copy_of
from pipeline.model.partition import Layer
from pipeline.plan.plan import Plan
from pipeline.run.holdings import tensors_of
from pipeline.schedule.modes import MODES
from pipeline.wording import text_of

__all__ = ["Trial", "check_learns", "main_output", "try_loss", "with_loss"]

_Loss = Callable[[Any, Any], Tensor]
_SAME_DIRECTION = 0.99  # cosine; weighted means over the rows differ in their scale alone


@dataclass(frozen=True)
class Trial:
    """A loss (output, labels) -> scalar that was tried on the network's output [rows, ...] for batch 0."""

    loss: _Loss
    output: Tensor
    labels: Any

    @property
    def rows(self) -> int:
        """Rows of the labels."""
        return len(present(as_bundle(self.labels)[0]))

    def error(self, rows: int) -> Exception | None:
        """What it raises for the first ``rows`` rows; None: nothing, or the output has other rows than the labels."""
        try:
            with torch.no_grad():
                self.loss(self.output[:rows].clone(), _copied(self.labels, rows))
        except Exception as error:
            return error if len(self.output) == self.rows else None
        return None

    def needs_more(self, rows: int) -> str | None:
        """Why ``rows`` rows have another gradient alone than in the whole batch; None: the same, but for size."""
        if rows >= self.rows or len(self.output) != self.rows:
            return None
        if (error := self.error(rows)) is not None:
            return f"it does not take {rows} rows ({str(error).partition(chr(10))[0]})"
        whole, alone = self._gradient(self.rows)[:rows].flatten(), self._gradient(rows).flatten()
        sizes = torch.linalg.vector_norm(whole) * torch.linalg.vector_norm(alone)
        depends = (whole * alone.conj()).sum().real < _SAME_DIRECTION * sizes
        return "what it says of a row depends on the other rows" if depends else None

    def _gradient(self, rows: int) -> Tensor:
        leaf = self.output[:rows].detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(leaf.clone(), _copied(self.labels, rows))
        (gradient,) = torch.autograd.grad(loss, [leaf], allow_unused=True)
        return torch.zeros_like(leaf) if gradient is None else gradient.detach()


def check_learns(layers: Sequence[Layer], inputs: Tensor, outputs: Sequence[Any]) -> None:
    """Refuse a model that no loss can teach. Runs the topmost layers, down to one that learns, in training mode."""
    if not any(parameter.requires_grad for layer in layers for parameter in layer.module.parameters()):
        raise PlanError(
            "the model has no parameter that requires a gradient, so nothing would be learned: leave some layers "
            "unfrozen (requires_grad_(True))."
        )
    for layer, x in zip(reversed(layers), reversed([inputs, *outputs[:-1]]), strict=True):
        module = copy_of(layer.module).train()
        if _has_gradient(module, x, at_x=False):
            return
        if layer is layers[0] or not (differentiable(as_bundle(x)) and _has_gradient(module, x, at_x=True)):
            raise PlanError(
                f"no gradient comes through layer {layer.name} to a parameter that requires one, so nothing would be "
                "learned: look for detach(), no_grad() or whole numbers in its forward, or unfreeze layers."
            )


def main_output(loss: _Loss, given: Any, labels: Any, plan: Plan) -> tuple[MainOutput | None, Tensor, _Loss]:
    """The tensor, among those that the network gives, that the loss depends on, where it lies (None: it is all), and
    the loss of that tensor.

    Raises:
        PlanError: the loss takes something else, depends on none of them, or on several where a DNI, or a loss of a
            stage's own, has to stand for the rest of the network.
    """
    if isinstance(given, Tensor):
        return None, given, loss
    layout, tensors = Nesting.of(given), [each for each in as_bundle(given) if each is not None]
    leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in tensors]
    kinds = f"a {type(given).__name__} of {', '.join(str(list(each.shape)) for each in tensors)}"
    try:
        with torch.enable_grad():
            found = loss(layout.value(leaves), labels)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            gradients = iter(torch.autograd.grad(found, wanted, allow_unused=True))
    except Exception as error:
        raise PlanError(f"the loss does not take what the network gives, {kinds}: {text_of(error)}.") from error
    places = [place for place, leaf in enumerate(leaves) if leaf.requires_grad and next(gradients) is not None]
    if not places:
        raise PlanError(f"the loss depends on nothing that the network gives, {kinds}, so nothing would be learned.")
    outlet, main = MainOutput(layout, places[0]), tensors[places[0]]
    if plan.stages > 1 and MODES[plan.mode].gradient != "true":
        try:
            if len(places) > 1:
                raise ValueError(f"the loss depends on {len(places)} tensors of it")
            outlet.loss(loss)(main.detach().clone(), labels)
        except Exception as error:
            raise PlanError(
                f"the network gives {kinds}, and in mode {plan.mode} every stage needs a loss of one tensor of it "
                f"({text_of(error)}): compute the loss from the logits alone, or choose mode naive, gpipe, 1f1b or "
                "async-1f1b."
            ) from error
    others = () if len(places) == 1 else tuple(each.detach() for each in tensors)
    return outlet, main, outlet.loss(loss, others)


def try_loss(loss: _Loss, output: Tensor, labels: Any, *, without_labels: bool = False) -> Trial:
    """Try the loss with gradients, on copies: neither the tensors nor a loss that has a state are changed.

    PlanError: it does not take them, gives no finite number with a gradient, or has parameters or a state of its own.
    """
    given = ", ".join(f"{list(each.shape)} {each.dtype}" for each in map(present, as_bundle(labels)))
    others = ", which are the inputs as the batch has no others," if without_labels else ""
    shapes = f"output {list(output.shape)} {output.dtype} and labels{others} {given}"
    if not (output.is_floating_point() or output.is_complex()):
        raise PlanError(f"the network gives {shapes}: only floating-point outputs have a gradient.")
    with contextlib.suppress(Exception):  # not everything can be copied; it is then tried as it is
        loss = copy.deepcopy(loss)
    held = {name: (tensor, _version(tensor)) for name, tensor in tensors_of(loss, deep=True)}
    leaf = output.detach().clone().requires_grad_()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Using a target size")  # it would broadcast, and only warns
            found: Any = loss(leaf.clone(), _copied(labels, None))
    except Exception as error:
        raise PlanError(
            f"the loss does not take {shapes}: give labels of the shape it needs ({text_of(error)})."
        ) from error
    if (problem := _no_number(found, shapes)) is not None:
        raise PlanError(f"the loss gives {problem}")
    _check_own(loss, found, leaf, held)
    if not found.requires_grad:
        raise PlanError(
            "the loss has no gradient, so nothing would be learned: leave out detach(), no_grad() and .data in it."
        )
    try:
        (gradient,) = torch.autograd.grad(found, [leaf], allow_unused=True)
    except RuntimeError as error:
        raise PlanError(f"the backward pass of the loss fails ({text_of(error)}): mend it there.") from error
    if gradient is None:
        raise PlanError("the loss does not depend on the network's output, so nothing would be learned: mend it there.")
    return Trial(loss, output, labels)


def with_loss(cuts: tuple[Cut, ...], plan: Plan, trial: Trial) -> tuple[tuple[Cut, ...], list[tuple[str, str, str]]]:
    """The cuts, told whether the loss means whole batches only, and what is said of it.

    PlanError: it does not take microbatches, or a DNI is to train on some rows and it needs all.
    """
    says = []
    if plan.microbatches > 1:
        rows = trial.rows // plan.microbatches
        if (error := trial.error(rows)) is not None:
            raise PlanError(
                f"the loss does not take the {rows} rows of a microbatch ({text_of(error)}): choose mode naive, or a "
                "loss of any number of rows."
            ) from error
        if (why := trial.needs_more(rows)) is not None:
            says.append(("loss", "by microbatch", f"{why}, so this is not the loss of whole batches"))
    models = [cut for cut in cuts if plan.unlocked and describe_form(cut, plan.dni)[0] == "loss_model"]
    least = min((training_window(cut, plan.dni, plan.seed).size for cut in models), default=trial.rows)
    if (why := trial.needs_more(least)) is None:
        return cuts, says
    if plan.dni.rows != 1:
        raise PlanError(f"dni.rows is {plan.dni.rows}, and the loss needs whole batches: {why}; leave dni.rows out.")
    says.append(("loss", "whole batches", f"the DNIs train on all rows: {why}"))
    return tuple(dataclasses.replace(cut, whole_batches=True) for cut in cuts), says


def _no_number(found: Any, shapes: str) -> str | None:
    """What is wrong with what a loss gave for these shapes; None: it is one finite number."""
    if found is None:
        return f"None for {shapes}: return the loss."
    if isinstance(found, tuple | list | dict):
        alone = "give it back alone, and count right answers in correct()."
        return f"a {type(found).__name__} of {len(found)} for {shapes}: {alone}"
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__} for {shapes}: return the tensor itself (without .item()), or no gradient."
    if found.dim() != 0:
        return f"a tensor of shape {list(found.shape)} for {shapes}: reduce it to one number, as .mean() does."
    if not found.is_floating_point():
        return f"a number of {found.dtype} for {shapes}: only floating-point numbers can be made small by gradients."
    if not math.isfinite(value := float(found.detach())):
        return f"{value} for batch 0, {shapes}: look at the inputs and labels of this batch."
    return None


def _has_gradient(module: nn.Module, x: Any, *, at_x: bool) -> bool:
    """Whether the module's output has a gradient: at its parameters, or ``at_x`` too. Where it fails, others say so."""
    given = [None if each is None else each.detach().clone() for each in as_bundle(x)]
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            for tensor in differentiable(tuple(given)):
                tensor.requires_grad_(at_x)
            output = module(as_value(tuple(each if each is None else each.clone() for each in given)))
    except Exception:
        return True
    return any(each.requires_grad for each in as_bundle(output) if isinstance(each, Tensor))


def _check_own(loss: _Loss, found: Tensor, leaf: Tensor, held: dict[str, tuple[Tensor, int]]) -> None:
    """Refuse a loss that learns, or keeps a state. ``held``: what it had before its call, with the versions of it."""
    trained = {id(t): t for _, t in tensors_of(loss, deep=False) if t.requires_grad and t.is_leaf}
    trained.update((id(tensor), tensor) for tensor in leaves_of(found) if tensor is not leaf)
    if trained:
        names = {id(tensor): name for name, (tensor, _) in reversed(held.items())}
        said = ", ".join(f"{names.get(key, 'a tensor')} {list(tensor.shape)}" for key, tensor in trained.items())
        raise PlanError(
            f"the loss has something to learn of its own, {said}, which no stage trains or saves: make it part of the "
            "model's last layer, or freeze it (requires_grad_(False))."
        )
    after = dict(tensors_of(loss, deep=True))
    changed = [
        name
        for name, (tensor, version) in held.items()
        if name in after and (after[name] is not tensor or _version(after[name]) != version)
    ]
    if changed:
        raise PlanError(
            f"the loss changes a state of its own at every call, {', '.join(changed)}, which no stage keeps: make it "
            "part of the model, or compute it from the batch."
        )


def _copied(labels: Any, rows: int | None) -> Any:
    first = rows_in(labels, slice(rows))
    return tuple(present(each).clone() for each in first) if isinstance(first, tuple) else first.clone()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
