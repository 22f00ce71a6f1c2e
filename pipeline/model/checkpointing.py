"""Activation checkpointing inside a stage (``torch.utils.checkpoint``): layers computed anew in a backward pass.

    use_reentrant=False   computed anew when the backward pass asks for what was not saved; any kind of backward pass
    use_reentrant=True    a backward pass within the backward pass: ``Tensor.backward`` of everything at once only, and
                          its weights learn only if its input needs a gradient

A stage goes backward on the weights of the forward pass, and has its input need a gradient where there is a reentrant
one, so both give what the layers without checkpointing give.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.errors import PlanError
from pipeline.model.autograd_graph import nodes_behind
from pipeline.model.partition import Layer
from pipeline.model.segment import copies_of
from pipeline.plan.plan import Plan
from pipeline.seeding import seeded

__all__ = ["check_checkpointing", "checkpoints_reentrantly"]

_TORCH = os.path.dirname(torch.nn.__file__)


def checkpoints_reentrantly(h: Tensor) -> bool:
    """Whether the graph of ``h`` has a layer in it that is computed by ``checkpoint(..., use_reentrant=True)``."""
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes_behind(h))


def check_checkpointing(stages: Sequence[Sequence[Layer]], plan: Plan, inputs: Tensor) -> None:
    """Refuse reentrant checkpointing where it would compute something else than the layers without it.

    Copies of the layers run once in training mode where a layer's code speaks of checkpoints, or gradients are taken
    through a stage in parts (targets true and mixed, sampled batches).
    """
    parts = plan.unlocked and (plan.targets != "bootstrap" or plan.quality_every is not None or plan.unlock == "auto")
    parts = parts and plan.stages > 1
    layers = [layer for stage in stages for layer in stage]
    if not parts and not any(_speaks_of_checkpoints(module) for layer in layers for module in layer.module.modules()):
        return
    h = inputs
    with seeded(plan.seed, "checkpointing"), torch.enable_grad():
        for layer, module in zip(layers, copies_of(layers), strict=True):
            if not isinstance(h, Tensor):  # what is checkpointed behind a tuple the run finds out
                return
            needs_gradient = h.requires_grad
            h = h.detach().requires_grad_(needs_gradient).clone()  # no leaf: a layer may work in place
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    h = module.train()(h)
                except Exception:  # the run will say it, with the batch
                    return
            if any("None of the inputs have requires_grad=True" in str(warning.message) for warning in caught):
                raise PlanError(_refusal(layer, "what comes in needs no gradient: torch then gives its weights none"))
            if parts and checkpoints_reentrantly(h):
                why = "targets true and mixed, quality_every and unlock auto take gradients through a stage in parts"
                raise PlanError(_refusal(layer, why))


def _speaks_of_checkpoints(module: nn.Module) -> bool:
    """Whether a method of its class names anything like ``checkpoint``."""
    codes = (getattr(member, "__code__", None) for kind in type(module).__mro__ for member in vars(kind).values())
    own = (code for code in codes if code is not None and not code.co_filename.startswith(_TORCH))
    return any("checkpoint" in name for code in own for name in (*code.co_names, *code.co_freevars))


def _refusal(layer: Layer, why: str) -> str:
    return f"layer {layer.name} is checkpointed with use_reentrant=True, and {why}: choose use_reentrant=False there."
