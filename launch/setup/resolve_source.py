"""Before a process starts: everything that can be said about a run, from its recipe and its plan.

plan --check--> recipe, tried --> devices, time per layer --> sizes, cuts, shapes --> loss and scores, tried --> memory
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from launch.setup.layer_times import layer_seconds, layer_seconds_on
from launch.setup.local_gpus import chosen_here
from launch.setup.recipe_source import check_travels
from pipeline import Plan, PlanError, Recipe
from pipeline.data.network import tried
from pipeline.data.recipe import build_model, check_scores, label_problem
from pipeline.plan.check import check_plan
from pipeline.plan.device_choice import DeviceChoice, first_gpu
from pipeline.run.resolve import Measure, resolve
from pipeline.run.resolved import Resolved
from pipeline.user_code import RecipeFailed, calling, place_of
from workers.channels.shm.host_memory import check_shared_memory
from workers.wiring.run_memory import needed_bytes

__all__ = ["resolve_source"]


def resolve_source(
    source: Callable[[], Recipe],
    plan: Plan,
    hosts: Sequence[str] | None = None,
    worker: int = 0,
    devices: DeviceChoice | None = None,
) -> Resolved:
    """Everything that can be said before a process starts.

    Args:
        hosts: of every worker, those of replica 0 first; None: all on this one.
        worker: one that is on this host.
        devices: where every worker computes; None: as the plan says, with as many GPUs on every host as here.

    Raises:
        PlanError: recipe and plan do not fit, there is no such device, or there is too little shared memory.
    """
    check_plan(plan)
    if plan.hop_steps and not plan.deterministic:
        raise PlanError(
            "hop_steps has no effect in processes without deterministic: leave it out, or add deterministic."
        )
    check_travels(source)
    recipe = source()
    if isinstance(recipe.model, nn.Module) or not callable(recipe.model):
        raise PlanError(
            f"model is a {type(recipe.model).__name__}: give the function that builds it; every worker builds its own."
        )
    devices = devices or chosen_here(plan, hosts)
    gpu = first_gpu(devices.devices) if devices.here else None
    on_cpu = partial(layer_seconds, threads=plan.threads)
    measure: Measure = on_cpu if gpu is None else lambda layers, inputs: layer_seconds_on(source, plan, gpu)
    with warnings.catch_warnings(), calling():
        warnings.simplefilter("ignore")  # of the user's model, in a trial run; workers show them
        try:
            resolved = resolve(recipe, plan, measure, hosts, devices)
        except PlanError as error:
            _check_labels(recipe, plan, error)
            if isinstance(error, RecipeFailed) or not (place := place_of(error)):
                raise
            raise PlanError(f"{str(error).removesuffix('.')}{place}.") from error
        if not resolved.structured:
            likely = torch.rand(resolved.output_shape, generator=torch.Generator().manual_seed(plan.seed))
            check_scores(recipe, likely, recipe.seeded_batch(plan.seed, 0).labels)
    here = None if hosts is None else [k for k, host in enumerate(hosts) if host == hosts[worker]]
    check_shared_memory(needed_bytes(resolved, here))
    return resolved


def _check_labels(recipe: Recipe, plan: Plan, error: PlanError) -> None:
    """Where a loss met an index out of bounds in batch 0: say so if it is a label, which the loss does not."""
    if "out of bounds" not in str(error):
        return
    batch, model = recipe.seeded_batch(plan.seed, 0), build_model(recipe, plan.seed)
    output = tried(model, batch.inputs, plan)[1][-1]
    if not (isinstance(output, Tensor) and isinstance(batch.labels, Tensor)):
        return
    if (problem := label_problem(batch.labels, output.shape)) is not None:
        raise PlanError(f"batch 0: {problem}.") from error
