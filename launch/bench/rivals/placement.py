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
from pipeline.messages.nesting import Nesting
from pipeline.model.partition import balanced_split, layers_of, split
from pipeline.model.proof import check_chain, ties_of
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
    takes: Callable[[int, int], bool] = lambda parts, ranks: True
    needs: str = ""
    v: bool = False


_ROUNDS = "microbatches that make full rounds over the ranks"
_INTERLEAVED = Schedule(2, lambda parts, ranks: parts % max(1, parts // ranks) == 0, _ROUNDS)

TORCH_SCHEDULES = {
    "GPipe": Schedule(),
    "1F1B": Schedule(1, lambda parts, ranks: parts >= ranks, "as many microbatches as ranks"),
    "Interleaved1F1B": _INTERLEAVED,
    "InterleavedZeroBubble": _INTERLEAVED,
    "ZBVZeroBubble": Schedule(2, v=True),
}
"""The schedules of torch.distributed.pipelining that are compared with, by torch's own names."""


@dataclass(frozen=True)
class Boundary:
    """A tensor that enters or leaves a virtual stage, for one microbatch.

    ``shape`` is [rows of a microbatch, ...]; the dtype goes by its name, as a placement is sent to other hosts.
    """

    shape: tuple[int, ...]
    dtype_name: str

    def example(self, rows: int | None = None, *, requires_grad: bool = False) -> Tensor:
        """A tensor like it; with another number of rows where it is given."""
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        return torch.empty(shape, dtype=getattr(torch, self.dtype_name), requires_grad=requires_grad)


@dataclass(frozen=True)
class Placement:
    """How many layers each virtual stage has, and its rank; edges[i] enters virtual stage i, edges[i + 1] leaves it."""

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
    """Raise PlanError: no such schedule, microbatches of unequal size, or a number that the schedule does not take."""
    if name not in TORCH_SCHEDULES:
        raise PlanError(nearest(name, TORCH_SCHEDULES, "schedule"))
    rows, ranks, schedule = resolved.batch_shape[0], resolved.plan.stages, TORCH_SCHEDULES[name]
    if microbatches < 1 or rows % microbatches:
        raise PlanError(f"{microbatches} microbatches for batches of {rows} rows: give a number that divides the rows.")
    if not schedule.takes(microbatches, ranks):
        raise PlanError(f"{microbatches} microbatches on {ranks} ranks: {name} needs {schedule.needs}.")


def place(recipe: Recipe, resolved: Resolved, name: str, microbatches: int) -> Placement:
    """Cut the network for a schedule, and run it once on a microbatch, in evaluation mode.

    One virtual stage per rank has the run's own sizes; several are balanced by the measured seconds of the layers if
    there are any, else by their number.

    Raises:
        PlanError: too few layers, weights tied across virtual stages, a first stage that has nothing to train.
    """
    schedule, ranks = TORCH_SCHEDULES[name], resolved.plan.stages
    if resolved.plan.split == "forward" or resolved.structured or resolved.labels != Nesting.of(torch.empty(0)):
        raise PlanError(f"{name} is compared on chains of layers from tensor to tensor only: leave that row out.")
    model = build_model(recipe, resolved.plan.seed)
    layers, sizes = layers_of(model), resolved.sizes
    if schedule.per_rank > 1:
        needed = ranks * schedule.per_rank
        if len(layers) < needed:
            there_are = f"{name} on {ranks} ranks needs {needed} layers, and the model has {len(layers)}"
            raise PlanError(f"{there_are}: use fewer stages, or GPipe or 1F1B.")
        sizes = balanced_split(layers, resolved.layer_seconds or [1.0] * len(layers), needed)
    stages = split(layers, sizes)
    if ties_of(stages) is not None:
        raise PlanError(f"{name} is compared without tied weights only: leave that row out.")
    inputs = recipe.batch(0).inputs[: resolved.batch_shape[0] // microbatches]
    outputs = check_chain(model, layers, inputs)
    if not any(p.requires_grad for layer in stages[0] for p in layer.module.parameters()):
        # torch's stages give a gradient to every activation, and without parameters there is none
        names = ", ".join(layer.name for layer in stages[0])
        raise PlanError(f"the first stage under {name} ({names}) has nothing to train: give it a layer with weights.")
    values = [inputs, *(outputs[stage[-1].index] for stage in stages)]
    edges = tuple(Boundary(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for value in values)
    there = range(ranks)
    return Placement(sizes, (*there, *(reversed(there) if schedule.v else there))[: len(sizes)], edges)
