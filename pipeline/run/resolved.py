"""A run without open questions: what recipe and plan come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.data.recipe import Recipe
from pipeline.messages.nesting import Nesting
from pipeline.model.cut import Cut
from pipeline.plan.channel_choice import ChannelChoice
from pipeline.plan.plan import Plan
from pipeline.run.sketch import Sketch

__all__ = ["Resolved"]


@dataclass(frozen=True)
class Resolved:
    """A run without open questions.

    Attributes:
        plan: with ``steps``, ``sizes``, ``dni.every``, and where needed ``evaluate_every`` and ``quality_every``.
        layer_names: of the whole network, in order.
        layer_parameters: number of parameters of each layer.
        layer_bytes: of each layer's parameters and buffers, and one more for each of them.
        layer_seconds: measured cost of each layer, or None when the plan fixed the sizes.
        cuts: what is known at each cut.
        batch_shape: shape of the inputs of a batch.
        output_shape: shape of the network's output for it.
        held_out_batches: batches of one evaluation pass.
        channels: what carries each cut, those of replica 0 first.
        hosts: of every worker, those of replica 0 first.
        devices: of every worker.
        nccl: whether torch has NCCL.
        reasons: (what was decided, value, why), for the first screen.
        two_labels: those of the first rows of batch 0, for ``fingerprint``.
        structured: whether the network gives something else than one tensor.
        labels: how the tensors of the context lie in what the loss takes.
        fingerprints: of every stage as this process builds it.
    """

    plan: Plan
    layer_names: tuple[str, ...]
    layer_parameters: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    layer_seconds: tuple[float, ...] | None
    cuts: tuple[Cut, ...]
    batch_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    held_out_batches: int
    channels: tuple[ChannelChoice, ...]
    hosts: tuple[str, ...]
    devices: tuple[str, ...]
    nccl: bool
    reasons: tuple[tuple[str, str, str], ...]
    two_labels: bytes = b""
    structured: bool = False
    labels: Nesting | None = None
    fingerprints: tuple[Mapping[str, Sketch], ...] = ()

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
        """Of each stage: bytes of its parameters and buffers, and one more for each of them."""
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        return tuple(sum(self.layer_bytes[i : i + n]) for i, n in zip(starts, self.sizes, strict=True))

    @property
    def step_rows(self) -> int:
        """Rows that one step of all replicas trains on."""
        return self.batch_shape[0] * self.plan.replicas

    @property
    def warmup(self) -> int:
        """Batches that do not count in a throughput: a tenth, at least one, and none that may be the last."""
        first_look = self.plan.evaluate_every if self.plan.until is not None else None
        return max(1, min(self.steps // 10, self.steps - 1, (first_look or self.steps) - 1))
