"""Pipelines run by torch.distributed.pipelining: its schedules on our layers, cut as our own stages are.

It is imported where a schedule runs: it brings torch's compiler along, two seconds at the start of every command.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from launch.bench.rivals.forward import ForwardPass
from launch.bench.rivals.loop import Training, assembled
from launch.bench.rivals.placement import Placement, check_microbatches, place
from launch.bench.rivals.ranks import HERE, Places, run_ranks
from launch.bench.rivals.record import RankRun, RivalRun
from pipeline.data.recipe import Recipe, build_model
from pipeline.errors import PlanError
from pipeline.model.optimizers import build_optimizer
from pipeline.model.partition import Layer, layers_of, split
from pipeline.run.resolved import Resolved
from pipeline.seeding import derived_seed

__all__ = ["TorchSchedule", "best_microbatches", "run_torch_schedule"]


def run_torch_schedule(
    source: Callable[[], Recipe],
    resolved: Resolved,
    schedule: str,
    *,
    microbatches: int,
    threads: int,
    warmup: int,
    within_s: float = 3600.0,
    evaluates: bool = True,
    weights: Path | None = None,
    places: Places = HERE,
) -> RivalRun:
    """Train with one of torch's own pipeline schedules over gloo, one rank per stage of the plan.

    Losses of microbatches are means over equal numbers of rows, and torch divides the summed gradients by the number of
    microbatches: the step is that of the whole batch. BatchNorm sees one microbatch at a time. A look at the held-out
    data takes its batches through the same stages, forward only. Args as in ``Training``; ``schedule`` is one of
    ``TORCH_SCHEDULES``; blocks and fails as ``run_ranks``.

    Raises:
        PlanError: the schedule cannot run so; nothing was started.
    """
    check_microbatches(schedule, resolved, microbatches)
    rival = TorchSchedule(schedule, microbatches, place(source(), resolved, schedule, microbatches))
    training = Training(source, resolved.plan, warmup, evaluates, weights)
    peer, ranks = f"torch's {schedule}", resolved.plan.stages
    return run_ranks(peer, rival, training, ranks=ranks, threads=threads, within_s=within_s, places=places)


def best_microbatches(
    source: Callable[[], Recipe], resolved: Resolved, schedule: str, *, threads: int, places: Places = HERE
) -> dict[int, float]:
    """Samples per second with 1, 2, 4 and 8 microbatches, as far as batch and schedule allow, by trials of a few steps.

    Of two trials the faster one counts: noise only ever adds time. Args as in ``run_torch_schedule``.

    Raises:
        PlanError: no number fits, or the schedule cannot run.
        RunFailed: a trial failed.
    """
    refusals, possible = [], []
    for parts in (1, 2, 4, 8):
        try:
            check_microbatches(schedule, resolved, parts)
            possible.append(parts)
        except PlanError as error:
            refusals.append(str(error))
    if not possible:
        raise PlanError(*refusals)
    short = replace(resolved, plan=replace(resolved.plan, steps=6, evaluate_every=None, until=None))
    options: dict[str, Any] = {"threads": threads, "warmup": 2, "evaluates": False, "places": places}
    tried: dict[int, float] = {}
    for parts in possible * 2:
        run = run_torch_schedule(source, short, schedule, microbatches=parts, **options)
        tried[parts] = max(tried.get(parts, 0.0), run.batches * resolved.batch_shape[0] / run.seconds)
    return tried


class TorchSchedule(msgspec.Struct, tag=True, frozen=True):
    """What a rank does."""

    schedule: str
    microbatches: int
    placement: Placement

    def __call__(self, training: Training, rank: int) -> RankRun:
        """Train, in a process group that stands."""
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)  # it would print the schedule
        recipe, plan = training.source(), training.plan
        mine = self.placement.stages_of(rank)
        stages = split(layers_of(build_model(recipe, plan.seed)), self.placement.sizes)
        local = [layer for index in mine for layer in stages[index]]
        torch.manual_seed(derived_seed(plan.seed, "rank", rank))
        chains = {index: _chain(stages[index], is_first=index == 0) for index in mine}
        schedule = self._schedule(recipe, chains)
        look = partial(ForwardPass(self.placement, chains).scores, recipe) if plan.until is not None else None
        parameters = [p for layer in local for p in layer.module.parameters() if p.requires_grad]
        optimizer = build_optimizer(plan.optimizer, parameters, plan.steps)
        first, last = 0 in mine, len(stages) - 1 in mine

        def step(index: int) -> float | None:
            inputs, labels = recipe.seeded_batch(plan.seed, index) if first or last else (None, None)
            given, target = ((inputs,) if first else ()), ({"target": labels} if last else {})
            losses: list[Tensor] = []
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
            schedule.step(*given, losses=losses, return_outputs=False, **target)
            if optimizer is not None:
                optimizer.step()
            return float(torch.stack(losses).detach().mean()) if last else None

        whole = partial(assembled, recipe, plan, local, self.placement.owners)
        return training.run(recipe, rank, step, whole, look)

    def _schedule(self, recipe: Recipe, chains: Mapping[int, nn.Module]) -> Any:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

        stages, total, here = [], len(self.placement.sizes), torch.device("cpu")
        for index, chain in chains.items():
            # Given shapes spare an extra pass; without requires_grad torch's first stage raises, and the others wait.
            before, after = self.placement.edges[index : index + 2]
            given, made = (before.example(requires_grad=index > 0),), (after.example(requires_grad=True),)
            stages.append(PipelineStage(chain, index, total, here, input_args=given, output_args=made))
        kind: Any = get_schedule_class(self.schedule)
        several = issubclass(kind, PipelineScheduleMulti)
        return kind(stages if several else stages[0], self.microbatches, loss_fn=recipe.loss)


class _Own(nn.Module):
    """Takes an activation over, for a layer that writes to its input: torch keeps the activation as a leaf."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _chain(layers: Sequence[Layer], *, is_first: bool) -> nn.Sequential:
    writes_to_input = any(getattr(module, "inplace", False) for module in layers[0].module.modules())
    head = [_Own()] if writes_to_input and not is_first else []
    return nn.Sequential(*head, *(layer.module for layer in layers))
