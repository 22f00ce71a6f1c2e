"""What every rank of every rival does alike: the timed loop, its memory, and the final look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from launch.bench.rivals.record import RankRun
from launch.bench.rivals.timed_loop import TimedLoop
from pipeline.data.network import layers_for
from pipeline.data.recipe import Recipe, open_data
from pipeline.errors import PlanError
from pipeline.model.compute import ComputeContext
from pipeline.model.partition import Layer
from pipeline.model.segment import network_of
from pipeline.plan.device_choice import CPU
from pipeline.plan.plan import Plan
from pipeline.stage.evaluation import EvaluationMetrics, scores_of
from workers.processes.claim_gpu import peak_memory_bytes

__all__ = ["Rival", "Training", "as_bytes", "assembled", "broadcast"]


@dataclass(frozen=True)
class Training:
    """What is trained, and what is wanted at the end.

    Attributes:
        warmup: first batches that are not timed.
        evaluates: whether to look at the held-out batches at the end.
        weights: file for the final weights (safetensors, the unsplit model's names), or None.
    """

    source: Callable[[], Recipe]
    plan: Plan
    warmup: int
    evaluates: bool = True
    weights: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < (self.plan.steps or 0):
            raise PlanError(f"warmup is {self.warmup} for {self.plan.steps} steps: at least one step must be timed.")

    def run(
        self,
        recipe: Recipe,
        rank: int,
        step: Callable[[int], float | None],
        whole: Callable[[], Sequence[Layer]],
        look: Callable[[], EvaluationMetrics] | None,
        computing: ComputeContext | None = None,
    ) -> RankRun:
        """Train, then evaluate and write the weights in rank 0.

        Args:
            step: trains on one batch; its loss, where this rank computes it.
            whole: gives the trained network; called in all ranks or in none.
            look: this rank's part of the scores of one pass over the held-out batches; called between steps, in all
                ranks or in none. None: nothing is to be reached.
            computing: where and how the network computes; None: plainly, on the CPU.
        """
        summed = None if look is None else partial(_summed, look)
        loop, value, held_out = TimedLoop(self.plan, self.warmup, summed, dist.barrier), None, None
        open_data(recipe, self.plan)
        for index in loop:
            value = step(index)
        peak_bytes = peak_memory_bytes(str(computing.device) if computing else CPU)
        evaluates = self.evaluates and recipe.evaluation is not None
        layers = whole() if evaluates or self.weights is not None else []
        if rank == 0 and self.weights is not None:
            save_file({name: tensor.clone() for layer in layers for name, tensor in _state(layer)}, self.weights)
        if rank == 0 and evaluates:
            scores = scores_of(recipe, network_of(layers), computing)
            held_out = (scores.loss(), scores.accuracy()) if scores.rows else None
        return RankRun(loop.batches, loop.seconds, value, held_out, peak_bytes, loop.reached)


Rival = Callable[[Training, int], RankRun]
"""What one rank does: (what is trained, rank) -> what it found, once the process group stands. Plain data inside."""


@torch.no_grad()
def assembled(recipe: Recipe, plan: Plan, mine: Sequence[Layer], owners: Sequence[int]) -> list[Layer]:
    """The whole trained network, in every rank: its layers broadcast by those that trained them.

    ``mine`` are the layers this rank trained, ``owners`` the rank that trained each layer of the whole network.
    """
    trained, whole = {layer.index: layer for layer in mine}, layers_for(recipe, plan)
    for layer in whole:
        source = trained.get(layer.index, layer)
        for (_, target), (_, tensor) in zip(_state(layer), _state(source), strict=True):
            target.copy_(broadcast(tensor, owners[layer.index]))
    return whole


def _state(layer: Layer) -> list[tuple[str, Tensor]]:
    return [(layer.full(name), tensor) for name, tensor in layer.module.state_dict().items()]


def broadcast(tensor: Tensor, owner: int, group: Any = None) -> Tensor:
    """The tensor of rank ``owner``, in every rank of the group; by default in all."""
    flat = as_bytes(tensor)
    dist.broadcast(flat, owner, group=group)
    return flat.view(tensor.dtype).reshape(tensor.shape)


def as_bytes(tensor: Tensor) -> Tensor:
    """Its bytes, a view where it is contiguous: gloo does not know every dtype."""
    return tensor.reshape(-1).view(torch.uint8)


def _summed(look: Callable[[], EvaluationMetrics]) -> EvaluationMetrics:
    """The scores of all ranks together, the same in every rank: they all stop, or none does."""
    part = look()
    sums = torch.tensor([part.loss_sum, part.rows, part.correct, part.answers], dtype=torch.float64)
    dist.all_reduce(sums)
    loss_sum, rows, correct, answers = sums.tolist()
    return EvaluationMetrics(loss_sum, int(rows), correct, int(answers))
