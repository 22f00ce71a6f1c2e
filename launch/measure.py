"""How long each layer takes: what the balance of the stages rests on."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.partition import Layer

__all__ = ["layer_seconds"]

_ROUNDS = 5
_ENOUGH_S = 2.0  # a round more is not worth it after this long


def layer_seconds(layers: Sequence[Layer], inputs: Sequence[Tensor], threads: int = 1) -> list[float]:
    """Median seconds of forward and backward of each layer, measured in rounds over all layers.

    Works on copies: buffers and gradients of the model stay as they are.

    Args:
        layers: the layers.
        inputs: what goes into each of them.
        threads: compute threads, as many as a worker will have.

    Blocks:
        for six passes over the network, fewer when those take seconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    modules = [copy.deepcopy(layer.module).train() for layer in layers]
    seconds: list[list[float]] = [[] for _ in layers]
    begin = time.perf_counter()
    try:
        with torch.random.fork_rng():
            for _ in range(1 + _ROUNDS):
                for index, (module, x) in enumerate(zip(modules, inputs, strict=True)):
                    seconds[index].append(_once(module, x, is_first=index == 0))
                if time.perf_counter() - begin > _ENOUGH_S and len(seconds[0]) > 1:
                    break
    finally:
        torch.set_num_threads(before)
    return [statistics.median(rounds[1:]) for rounds in seconds]  # the first one warms up


def _once(module: torch.nn.Module, x: Tensor, *, is_first: bool) -> float:
    x = x.detach().clone()
    if x.is_floating_point() and not is_first:
        x.requires_grad_()
    begin = time.perf_counter()
    output = module(x.view_as(x))
    if output.requires_grad:
        output.backward(torch.ones_like(output))
    return time.perf_counter() - begin
