"""The yardstick: one process, a plain PyTorch loop, none of our machinery in the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from launch.bench.rivals import HERE, RivalRun, Training
from launch.bench.rivals.ranks import run_ranks
from launch.bench.rivals.record import RankRun
from pipeline.data.network import layers_for
from pipeline.data.recipe import Recipe
from pipeline.messages.bundle import as_value
from pipeline.messages.nesting import Nesting
from pipeline.model.compute import ComputeContext
from pipeline.model.optimizers import build_optimizer
from pipeline.model.segment import network_of
from pipeline.plan.device_choice import CPU
from pipeline.plan.plan import Plan
from pipeline.stage.evaluation import scores_of
from workers.processes.claim_gpu import prepare_device

__all__ = ["run_single"]


def run_single(
    source: Callable[[], Recipe],
    plan: Plan,
    *,
    threads: int,
    warmup: int,
    within_s: float = 3600.0,
    look: Callable[[], None] = lambda: None,
    device: str = CPU,
) -> RivalRun:
    """Train the unsplit model in a fresh process. Args as in ``Training``; blocks and fails as ``run_ranks``.

    On a GPU the forward pass is timed until it is queued; the loss is read at every step, which waits for the rest, and
    so does the clock.
    """
    rival, training = partial(_train_alone, device), Training(source, plan, warmup)
    options: dict[str, Any] = {"threads": threads, "within_s": within_s, "look": look}
    return run_ranks("the single-process run", rival, training, ranks=1, places=HERE, **options)


def _train_alone(device: str, training: Training, rank: int) -> RankRun:
    plan, recipe = training.plan, training.source()
    prepare_device(device, plan)
    computing = ComputeContext(plan, device)
    layers = layers_for(recipe, plan)
    modules = computing.placed(network_of(layers))
    network = computing.chain([modules]) or modules
    optimizer = build_optimizer(plan.optimizer, [p for p in modules.parameters() if p.requires_grad], plan.steps)
    assert optimizer is not None, "the recipe's model has parameters"
    spent = {"forward_s": 0.0, "backward_s": 0.0}

    def step(index: int) -> float:
        if index == training.warmup:
            spent.update(forward_s=0.0, backward_s=0.0)
        batch = recipe.seeded_batch(plan.seed, index)
        inputs, labels = (as_value(computing.brought(each)) for each in batch.tensors())
        loaded = time.perf_counter()
        with computing.autocast():
            output = network(inputs)
        forwarded = time.perf_counter()
        with computing.autocast():
            loss = recipe.arranged(Nesting.of(batch.labels)).loss(output, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        value = float(loss.detach())  # a GPU is waited for here
        spent["forward_s"] += forwarded - loaded
        spent["backward_s"] += time.perf_counter() - forwarded
        return value

    run = training.run(recipe, rank, step, lambda: layers, lambda: scores_of(recipe, modules, computing), computing)
    return msgspec.structs.replace(run, **spent)
