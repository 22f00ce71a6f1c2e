"""A run without open questions: what recipe and plan come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from pipeline.data.recipe import Recipe
from pipeline.messages.nesting import Nesting
from pipeline.model.cut import Cut
from pipeline.plan.channel_choice import ChannelChoice
from pipeline.plan.plan import Plan
from pipeline.run.reasons import Reason
from pipeline.run.sketch import Sketch

__all__ = ["Resolved"]


@dataclass(frozen=True)
class Resolved:
    """A run without open questions. What is of every worker, or of every cut, begins with those of replica 0."""

    plan: Plan  # with steps, sizes, split, ties, dni.every, and where needed evaluate_every and quality_every
    layer_names: tuple[str, ...]
    layer_parameters: tuple[int, ...]  # their number
    layer_bytes: tuple[int, ...]  # of parameters and buffers, and one more for each of them
    layer_seconds: tuple[float, ...] | None  # None: the plan fixed the sizes
    cuts: tuple[Cut, ...]
    batch_shape: tuple[int, ...]  # of the inputs
    output_shape: tuple[int, ...]  # of the network, for a batch
    held_out_batches: int
    channels: tuple[ChannelChoice, ...]  # of every cut
    hosts: tuple[str, ...]  # of every worker
    devices: tuple[str, ...]
    nccl: bool  # torch has it
    reasons: tuple[Reason, ...]
    two_labels: bytes = b""  # of the first rows of batch 0, for ``fingerprint``
    structured: bool = False  # the network gives something else than one tensor
    labels: Nesting | None = None  # how the tensors of the context lie in what the loss takes
    fingerprints: tuple[Mapping[str, Sketch], ...] = ()  # of every stage as this process builds it

    def arranged(self, recipe: Recipe) -> Recipe:
        """The recipe with a loss that takes the context as it travels."""
        return recipe if self.labels is None else recipe.arranged(self.labels)

    @property
    def steps(self) -> int:
        """Training batches of the run."""
        assert self.plan.steps is not None
        return self.plan.steps

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers per stage."""
        assert self.plan.sizes is not None
        return self.plan.sizes

    @property
    def state_bytes(self) -> tuple[int, ...]:
        """``layer_bytes`` of each stage."""
        rest = iter(self.layer_bytes)
        return tuple(sum(islice(rest, size)) for size in self.sizes)

    @property
    def step_rows(self) -> int:
        """Rows that one step of all replicas trains on."""
        return self.batch_shape[0] * self.plan.replicas

    @property
    def warmup(self) -> int:
        """Batches that do not count in a throughput: a tenth, at least one, and none that may be the last."""
        first_look = self.plan.evaluate_every if self.plan.until is not None else None
        return max(1, min(self.steps // 10, self.steps - 1, (first_look or self.steps) - 1))
