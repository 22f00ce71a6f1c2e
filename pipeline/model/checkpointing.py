"""Activation checkpointing inside a stage (``torch.utils.checkpoint``): layers computed anew in a backward pass.

    use_reentrant=False   computed anew when the backward pass asks for what was not saved; any kind of backward pass
    use_reentrant=True    a backward pass within the backward pass: ``Tensor.backward`` of everything at once only, and
                          nothing is learned from an input that needs no gradient

A stage keeps the weights of the forward pass in place while it goes backward, so both give what the layers without
checkpointing give. What a reentrant one cannot do is refused before anything starts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import PlanError
from pipeline.model.partition import Layer
from pipeline.plan.plan import Plan
from pipeline.seeding import seeded

__all__ = ["check_checkpointing", "checkpoints_reentrantly"]

_NODE = "CheckpointFunctionBackward"
_LEARNS_NOTHING = "None of the inputs have requires_grad=True"  # torch only warns


def checkpoints_reentrantly(h: Tensor) -> bool:
    """Whether the graph of ``h`` has a layer in it that is computed by ``checkpoint(..., use_reentrant=True)``."""
    found, seen = [h.grad_fn], set()
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        if node.name() == _NODE:
            return True
        seen.add(node)
        found.extend(below for below, _ in node.next_functions)
    return False


def check_checkpointing(stages: Sequence[Sequence[Layer]], plan: Plan, inputs: Tensor) -> None:
    """Refuse reentrant checkpointing where it would compute something else than the layers without it.

    Runs copies of the layers once in training mode where that could be: where gradients are taken through a stage in
    parts (targets true and mixed, sampled batches), and where nothing is trained in the first stage.

    Raises:
        PlanError: a layer is checkpointed so where that cannot be; it is named.
    """
    parts = plan.unlocked and (plan.targets != "bootstrap" or plan.quality_every is not None or plan.unlock == "auto")
    frozen = not any(p.requires_grad for layer in stages[0] for p in layer.module.parameters())
    if not (parts or frozen) or plan.stages == 1:
        return
    h = inputs.clone()
    with seeded(plan.seed, "checkpointing"), torch.enable_grad():
        for layer in (layer for stage in stages for layer in stage):
            trained = h.requires_grad
            h = h.detach().clone().requires_grad_(trained).clone()  # no leaf: a layer may work in place
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    h = copy.deepcopy(layer.module).train()(h)
                except Exception:  # the run will say it, with the batch
                    return
            if any(_LEARNS_NOTHING in str(warning.message) for warning in caught):
                why = "what comes in needs no gradient, and torch then gives its weights none"
                raise PlanError(_refusal(layer, why))
            if parts and checkpoints_reentrantly(h):
                why = "targets true and mixed, quality_every and unlock auto take gradients through a stage in parts"
                raise PlanError(_refusal(layer, why))


def _refusal(layer: Layer, why: str) -> str:
    return f"layer {layer.name} is checkpointed with use_reentrant=True, and {why}: choose use_reentrant=False there."
