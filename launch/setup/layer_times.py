"""How long each layer takes: what the balance of the stages rests on.

Noise only ever adds time, so the fastest round counts; and layers that look alike (the same modules, the same input)
cost alike, so the fastest of them counts for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.model.compute import ComputeContext
from pipeline.model.given_model import copy_of
from pipeline.model.partition import Layer
from pipeline.plan.plan import Plan

__all__ = ["layer_seconds"]

_ROUNDS = 5
_ENOUGH_S = 3.0  # a round more is not worth it after this long


def layer_seconds(
    layers: Sequence[Layer], inputs: Sequence[Tensor], threads: int = 1, computing: ComputeContext | None = None
) -> list[float]:
    """Seconds of forward and backward of each layer, measured in rounds over all of them.

    Works on copies: buffers and gradients of the model stay as they are.

    Args:
        layers: the layers.
        inputs: what goes into each of them.
        threads: compute threads, as many as a worker will have.
        computing: where and how; the inputs are there already. None: plainly, on the CPU.

    Blocks:
        for six passes over the network, three when those take seconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    computing = computing or ComputeContext(Plan())
    modules = [computing.placed(copy_of(layer.module)) for layer in layers]
    seconds: list[list[float]] = [[] for _ in layers]
    begin = time.perf_counter()
    try:
        gpus = [computing.device] if computing.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):  # by itself it would ask every GPU there is
            for _ in range(1 + _ROUNDS):
                for index, (module, x) in enumerate(zip(modules, inputs, strict=True)):
                    seconds[index].append(_once(module, x, computing, is_first=index == 0))
                if time.perf_counter() - begin > _ENOUGH_S and len(seconds[0]) > 2:
                    break
    finally:
        torch.set_num_threads(before)
    fastest: dict[tuple[object, ...], float] = {}
    kinds = [_kind(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    for kind, rounds in zip(kinds, seconds, strict=True):
        fastest[kind] = min(fastest.get(kind, float("inf")), *rounds[1:])  # the first round warms up
    return [fastest[kind] for kind in kinds]


def _kind(layer: Layer, x: Tensor) -> tuple[object, ...]:
    """Layers of one kind do the same work; the first layer has no input gradient to compute."""
    return repr(layer.module), sum(p.numel() for p in layer.module.parameters()), x.shape, layer.index == 0


def _once(module: torch.nn.Module, x: Tensor, computing: ComputeContext, *, is_first: bool) -> float:
    x = x.detach().clone()
    if x.is_floating_point() and not is_first:
        x = x.requires_grad_().clone()  # no leaf: a module may work in place
    computing.finish()
    begin = time.perf_counter()
    with computing.autocast():
        output = module(x)
    if output.requires_grad:
        output.backward(torch.ones_like(output))
    computing.finish()
    return time.perf_counter() - begin
