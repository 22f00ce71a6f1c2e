"""Proof, on batch 0 and before anything starts, that the parts of a model's own forward are the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import PlanError
from pipeline.messages.bundle import as_bundle, as_value
from pipeline.model.given_model import copy_of, hooks_of
from pipeline.model.partition import Layer
from pipeline.model.proof import Step, check_borrowing, close, equal
from pipeline.model.segment import Trace, parts_of
from pipeline.seeding import seeded
from pipeline.user_code import calling

__all__ = ["check_parts"]


def check_parts(model: nn.Module, known: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Prove that the parts of a model's forward, one after the other, are the whole; returns what each of them gives
    for these arguments (evaluation mode, as ``check_chain``).

    Raises:
        PlanError: the output, or in training the buffers or gradients, are other ones; or a part learns parameters of
            another one.
    """
    kind, inputs = type(model).__name__, (args, kwargs)
    if names := [getattr(hook, "__name__", type(hook).__name__) for hook in hooks_of(model)]:
        raise PlanError(
            f"{kind} has hooks on itself ({', '.join(names)}), which every stage would call: put them on a layer."
        )
    whole = copy_of(model)
    whole.eval()
    layers = parts_of(copy_of(model), known)
    for layer in layers:
        layer.module.eval()
    with torch.no_grad(), seeded(0, "proof"):
        expected = whole(*args, **kwargs)
    with torch.no_grad(), seeded(0, "proof"):
        outputs = _run_parts(layers, _first(inputs))
    if not _same(expected, outputs[-1]):
        raise PlanError(f"the parts of {kind}.forward give something else than the whole: split it at other places.")
    check_borrowing(parts_of(copy_of(model), known), _first(inputs))
    theirs = Step.of(model, lambda copied, given: copied(*given[0], **given[1]), inputs)
    mine = Step.of(model, lambda copied, given: _run_parts(parts_of(copied, known), _first(given))[-1], inputs)
    apart = [name for name, buffer in theirs.buffers.items() if not equal(buffer, mine.buffers[name])]
    apart += [name for name, gradient in theirs.gradients.items() if not close(gradient, mine.gradients[name])]
    if apart or not _same(theirs.output, mine.output):
        what = f"give {', '.join(apart[:3])} other values" if apart else "give something else"
        raise PlanError(f"in training the parts of {kind}.forward {what} than the whole: split it at other places.")
    return outputs


def _run_parts(layers: Sequence[Layer], value: Any) -> list[Any]:
    outputs = []
    for layer in layers:
        with calling(f"forward, layer {layer.name}"):
            value = layer.module(value)
        outputs.append(value)
    return outputs


def _first(inputs: Any) -> Any:
    """What the first part gets: the tensors among the arguments."""
    return as_value(tuple(each.clone() for each in as_bundle(inputs) if each is not None))


def _same(theirs: Any, mine: Any) -> bool:
    ours, others = as_bundle(mine), as_bundle(theirs)
    return len(ours) == len(others) and all(map(equal, others, ours))
