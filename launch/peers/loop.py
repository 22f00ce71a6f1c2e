"""What every rank of every rival does alike: the timed loop, its own part of the memory, and the final look."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from launch.peers.record import HeldOut, RankRun
from pipeline.errors import PlanError
from pipeline.partition import Layer, layers_of
from pipeline.plan import Plan
from pipeline.recipe import Recipe, build_model
from pipeline.scores import Scores

__all__ = ["Training", "assembled"]


@dataclass(frozen=True)
class Training:
    """What is trained, and what is wanted at the end.

    Attributes:
        source: makes the recipe.
        plan: steps, seed and optimizer.
        warmup: first batches that are not timed.
        evaluates: whether to look at the held-out batches.
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
        self, recipe: Recipe, rank: int, step: Callable[[int], float | None], whole: Callable[[], Sequence[Layer]]
    ) -> RankRun:
        """Train, then evaluate and write the weights in rank 0.

        Args:
            recipe: the problem.
            rank: of this process.
            step: trains on one batch; its loss, where this rank computes it.
            whole: gives the trained network; called in all ranks or in none.
        """
        steps, value, begin = self.plan.steps or 0, None, 0.0
        for index in range(steps):
            if index == self.warmup:
                dist.barrier()
                begin = time.perf_counter()
            value = step(index)
        seconds = time.perf_counter() - begin
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held_out = None
        if (self.evaluates and recipe.evaluation is not None) or self.weights is not None:
            layers = whole()
            held_out = self._finish(recipe, layers) if rank == 0 else None
        return RankRun(steps - self.warmup, seconds, value, held_out, peak_bytes)

    def _finish(self, recipe: Recipe, layers: Sequence[Layer]) -> HeldOut | None:
        if self.weights is not None:
            save_file({name: tensor.clone() for layer in layers for name, tensor in _state(layer)}, self.weights)
        return _evaluate(recipe, layers) if self.evaluates and recipe.evaluation is not None else None


@torch.no_grad()
def assembled(recipe: Recipe, plan: Plan, mine: Sequence[Layer], owners: Sequence[int], rank: int) -> list[Layer]:
    """The whole trained network, in every rank: its layers broadcast by those that trained them.

    Args:
        recipe: gives the model.
        plan: gives the seed.
        mine: the layers this rank trained.
        owners: the rank that trained each layer of the whole network.
        rank: of this process.
    """
    trained, whole = {layer.index: layer for layer in mine}, layers_of(build_model(recipe, plan.seed))
    for layer in whole:
        source = trained.get(layer.index, layer)
        for (_, target), (_, tensor) in zip(_state(layer), _state(source), strict=True):
            target.copy_(_broadcast(tensor, owners[layer.index]))
    return whole


def _state(layer: Layer) -> list[tuple[str, Tensor]]:
    return [(f"{layer.name}.{name}", tensor) for name, tensor in layer.module.state_dict().items()]


def _broadcast(tensor: Tensor, owner: int) -> Tensor:
    """As bytes: gloo does not know every dtype."""
    flat = tensor.contiguous().reshape(-1)
    dist.broadcast(flat.view(torch.uint8), owner)
    return flat.reshape(tensor.shape)


@torch.no_grad()
def _evaluate(recipe: Recipe, layers: Sequence[Layer]) -> HeldOut:
    scores = Scores()
    network = torch.nn.Sequential(*(layer.module for layer in layers)).eval()
    for inputs, labels in recipe.evaluation() if recipe.evaluation else ():
        scores.add(recipe, network(inputs), labels)
    return HeldOut(scores.loss(), scores.accuracy())
