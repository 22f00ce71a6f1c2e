"""How long each layer takes, here or in a process of its own on a GPU: what the balance of the stages rests on.

Noise only ever adds time, so the fastest round counts; and layers that look alike (the same modules, the same input)
cost alike, so the fastest of them counts for all.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from pipeline import Plan, PlanError, Recipe
from pipeline.data.network import layers_for
from pipeline.messages.bundle import as_bundle, as_value
from pipeline.model.compute import ComputeContext
from pipeline.model.partition import Layer
from pipeline.model.segment import copies_of
from pipeline.wording import said
from workers.processes.claim_gpu import prepare_device
from workers.processes.context import process_context
from workers.processes.end_with_parent import end_with_the_parent

__all__ = ["layer_seconds", "layer_seconds_on"]

_ROUNDS = 5
_ENOUGH_S = 3.0  # a round more is not worth it after this long
_WITHIN_S = 300.0


def layer_seconds(
    layers: Sequence[Layer], inputs: Sequence[Any], threads: int = 1, computing: ComputeContext | None = None
) -> list[float]:
    """Seconds of forward and backward of each layer, with what goes into it, measured in rounds over copies of all.

    ``computing``: where and how, the inputs are there already; None: plainly, on the CPU. Blocks for six passes over
    the network, three when those take seconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    computing = computing or ComputeContext(Plan())
    modules = [computing.placed(module) for module in copies_of(layers)]
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    try:
        gpus = [computing.device] if computing.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):  # by itself it would ask every GPU there is
            for _ in range(1 + _ROUNDS):
                pairs = enumerate(zip(modules, inputs, strict=True))
                rounds.append([_once(module, x, computing, is_first=index == 0) for index, (module, x) in pairs])
                if time.perf_counter() - begin > _ENOUGH_S and len(rounds) > 2:
                    break
    finally:
        torch.set_num_threads(before)
    kinds = [_kind(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    fastest: dict[tuple[object, ...], float] = {}
    for seconds in rounds[1:]:  # the first round warms up
        for kind, each in zip(kinds, seconds, strict=True):
            fastest[kind] = min(each, fastest.get(kind, each))
    return [fastest[kind] for kind in kinds]


def layer_seconds_on(source: Callable[[], Recipe], plan: Plan, device: str) -> list[float]:
    """``layer_seconds`` of the recipe's model on a GPU, in a process of its own: the driver initialises no CUDA."""
    context = process_context(__name__)
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(source, plan, device, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not mine.poll(_WITHIN_S):
            late = f"the layers could not be measured on {device} within {_WITHIN_S:.0f} s"
            raise PlanError(f"{late}: give --sizes, or --balance layers.")
        found: list[float] | str = mine.recv()
    except EOFError:
        found = "its process ended without a word"
    finally:
        process.kill()
        process.join(5.0)
        mine.close()
    if isinstance(found, str):
        raise PlanError(f"the layers cannot be measured on {device}: {found}. Give device cpu, or another model.")
    return found


def _kind(layer: Layer, x: Any) -> tuple[object, ...]:
    """Layers of one kind do the same work; the first layer has no input gradient to compute."""
    shapes = tuple(None if each is None else each.shape for each in as_bundle(x))
    return repr(layer.module), sum(p.numel() for p in layer.module.parameters()), shapes, layer.index == 0


def _once(module: nn.Module, x: Any, computing: ComputeContext, *, is_first: bool) -> float:
    given = [None if each is None else each.detach().clone() for each in as_bundle(x)]
    if not is_first:
        for place, each in enumerate(given):
            if each is not None and each.is_floating_point():
                given[place] = each.requires_grad_().clone()  # no leaf: a module may work in place
    computing.finish()
    begin = time.perf_counter()
    with computing.autocast():
        output = module(as_value(tuple(given)))
    if found := [each for each in as_bundle(output) if each is not None and each.requires_grad]:
        torch.autograd.backward(found, [torch.ones_like(each) for each in found])
    computing.finish()
    return time.perf_counter() - begin


def _main(source: Callable[[], Recipe], plan: Plan, device: str, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    end_with_the_parent()
    try:
        prepare_device(device, plan)
        recipe, inputs = source(), list[Any]()
        computing, layers = ComputeContext(plan, device), layers_for(recipe, plan)
        x: Any = as_value(computing.brought(recipe.seeded_batch(plan.seed, 0).tensors()[0]))
        with torch.no_grad(), computing.autocast():
            for module in copies_of(layers):
                inputs.append(x)
                given = tuple(None if each is None else each.clone() for each in as_bundle(x))
                x = computing.placed(module).eval()(as_value(given))
        found: list[float] | str = layer_seconds(layers, inputs, plan.threads, computing)
    except Exception as error:
        found = said(error)
    connection.send(found)
