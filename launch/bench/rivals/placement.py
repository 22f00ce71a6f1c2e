"""Which layers go to which rank under torch's schedules, and how many microbatches a schedule takes.

A rank may have several *virtual stages*. With 2 ranks and 4 virtual stages:

    loop   rank 0: 0 2    V   rank 0: 0 3        the activations of loop go round and round,
           rank 1: 1 3        rank 1: 1 2        those of V down to the last rank and back up
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.recipe import Recipe, build_model
from pipeline.errors import PlanError, nearest
from pipeline.model.partition import balanced_split, layers_of, split
from pipeline.model.proof import check_chain, check_ties
from pipeline.run.resolved import Resolved

__all__ = ["TORCH_SCHEDULES", "Boundary", "Placement", "Schedule", "check_microbatches", "place"]


@dataclass(frozen=True)
class Schedule:
    """What one of torch's schedules asks for.

    Attributes:
        per_rank: virtual stages per rank.
        takes: (microbatches, ranks) -> whether it can run so.
        needs: the same in words.
        v: virtual stages placed as a V, not as a loop.
    """

    per_rank: int = 1
    takes: Callable[[int, int], bool] = lambda microbatches, ranks: True
    needs: str = ""
    v: bool = False


_INTERLEAVED = Schedule(
    2,
    lambda microbatches, ranks: microbatches % max(1, microbatches // ranks) == 0,
    "microbatches that make full rounds over the ranks",
)

TORCH_SCHEDULES = {
    "GPipe": Schedule(),
    "1F1B": Schedule(1, lambda microbatches, ranks: microbatches >= ranks, "as many microbatches as ranks"),
    "Interleaved1F1B": _INTERLEAVED,
    "InterleavedZeroBubble": _INTERLEAVED,
    "ZBVZeroBubble": Schedule(2, v=True),
}
"""The schedules of torch.distributed.pipelining that are compared with, by torch's own names."""


@dataclass(frozen=True)
class Boundary:
    """A tensor that enters or leaves a virtual stage, for one microbatch.

    Attributes:
        shape: [rows of a microbatch, ...].
        dtype_name: its dtype's name in torch; a placement is plain data, which any host can be sent.
    """

    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def example(self, *, requires_grad: bool) -> Tensor:
        """A tensor like it."""
        return torch.empty(self.shape, dtype=self.dtype, requires_grad=requires_grad)


@dataclass(frozen=True)
class Placement:
    """Layers, virtual stages and ranks.

    Attributes:
        sizes: layers of each virtual stage.
        ranks: the rank of each virtual stage.
        edges: what goes in between: edges[i] enters virtual stage i, edges[i + 1] leaves it.
    """

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    edges: tuple[Boundary, ...]

    @property
    def owners(self) -> list[int]:
        """The rank of each layer."""
        return [rank for rank, size in zip(self.ranks, self.sizes, strict=True) for _ in range(size)]

    def stages_of(self, rank: int) -> list[int]:
        """The virtual stages of a rank, in order."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]


def check_microbatches(name: str, resolved: Resolved, microbatches: int) -> None:
    """Whether the schedule can cut the batches so.

    Raises:
        PlanError: no such schedule, microbatches of unequal size, or a number that the schedule does not take.
    """
    if name not in TORCH_SCHEDULES:
        raise PlanError(nearest(name, TORCH_SCHEDULES, "schedule"))
    rows, ranks, schedule = resolved.batch_shape[0], resolved.plan.stages, TORCH_SCHEDULES[name]
    if microbatches < 1 or rows % microbatches:
        raise PlanError(f"{microbatches} microbatches for batches of {rows} rows: give a number that divides the rows.")
    if not schedule.takes(microbatches, ranks):
        raise PlanError(f"{microbatches} microbatches on {ranks} ranks: {name} needs {schedule.needs}.")


def place(recipe: Recipe, resolved: Resolved, name: str, microbatches: int) -> Placement:
    """Cut the network for a schedule. Runs it once on a microbatch, in evaluation mode.

    One virtual stage per rank: the run's own sizes. Several: balanced by the measured seconds of the layers if there
    are any, else by their number.

    Raises:
        PlanError: too few layers, weights tied across virtual stages, a first stage that has nothing to train.
    """
    schedule, ranks = TORCH_SCHEDULES[name], resolved.plan.stages
    model = build_model(recipe, resolved.plan.seed)
    layers, sizes = layers_of(model), resolved.sizes
    if schedule.per_rank > 1:
        if len(layers) < ranks * schedule.per_rank:
            raise PlanError(
                f"{name} on {ranks} ranks needs {ranks * schedule.per_rank} layers, and the model has {len(layers)}: "
                "use fewer stages, or GPipe or 1F1B."
            )
        seconds = resolved.layer_seconds or [1.0] * len(layers)
        sizes = balanced_split(layers, seconds, ranks * schedule.per_rank)
    stages = split(layers, sizes)
    inputs = recipe.batch(0)[0][: resolved.batch_shape[0] // microbatches]
    check_ties(stages)
    outputs = check_chain(model, layers, inputs)
    if not any(p.requires_grad for layer in stages[0] for p in layer.module.parameters()):
        # torch's stages give a gradient to every activation, and without parameters there is none
        names = ", ".join(layer.name for layer in stages[0])
        raise PlanError(f"the first stage under {name} ({names}) has nothing to train: give it a layer with weights.")
    values = [inputs, *(outputs[stage[-1].index] for stage in stages)]
    edges = tuple(Boundary(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for value in values)
    there = range(ranks)
    back = reversed(there) if schedule.v else there
    return Placement(sizes, (*there, *back)[: len(sizes)], edges)
