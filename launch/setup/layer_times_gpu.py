"""How long each layer takes on a GPU, measured in a process of its own: the driver initialises no CUDA."""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec
import torch

from launch.setup.layer_times import layer_seconds
from pipeline import Plan, PlanError, Recipe
from pipeline.data.recipe import build_model
from pipeline.model.compute import ComputeContext
from pipeline.model.given_model import copy_of
from pipeline.model.partition import layers_of
from pipeline.wording import said
from workers.processes.claim_gpu import prepare_device
from workers.processes.context import process_context
from workers.processes.end_with_parent import end_with_the_parent

__all__ = ["layer_seconds_on"]

_WITHIN_S = 300.0


def layer_seconds_on(source: Callable[[], Recipe], plan: Plan, device: str) -> list[float]:
    """Seconds of forward and backward of each layer of the recipe's model; see ``launch.setup.layer_times``.

    Args:
        source: makes the recipe.
        plan: its seed, threads and autocast count.
        device: the GPU.

    Raises:
        PlanError: the process failed, with what it said, or did not end within 300 s.

    Blocks:
        for the start of a process and six passes over the network.
    """
    context = process_context(__name__)
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(source, plan, device, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not mine.poll(_WITHIN_S):
            raise PlanError(
                f"the layers could not be measured on {device} within {_WITHIN_S:.0f} s: give --sizes, or --balance "
                "layers."
            )
        said = msgspec.msgpack.decode(mine.recv_bytes(), type=list[float] | str)
    except EOFError:
        said = "its process ended without a word"
    finally:
        process.kill()
        process.join(5.0)
        mine.close()
    if isinstance(said, str):
        raise PlanError(f"the layers cannot be measured on {device}: {said}. Give device cpu, or another model.")
    return said


def _main(source: Callable[[], Recipe], plan: Plan, device: str, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    end_with_the_parent()
    try:
        prepare_device(device, plan)
        found: list[float] | str = _measured(source(), plan, device)
    except Exception as error:
        found = said(error)
    connection.send_bytes(msgspec.msgpack.encode(found))


def _measured(recipe: Recipe, plan: Plan, device: str) -> list[float]:
    computing, layers = ComputeContext(plan, device), layers_of(build_model(recipe, plan.seed))
    (x,) = computing.here(recipe.batch(0)[0])
    inputs = []
    with torch.no_grad(), computing.autocast():
        for layer in layers:
            inputs.append(x)
            x = computing.placed(copy_of(layer.module)).eval()(x.clone())
    return layer_seconds(layers, inputs, plan.threads, computing)
