"""Data parallel training by torch's DistributedDataParallel: the whole model and a slice of each batch per rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch.nn.parallel import DistributedDataParallel

from launch.bench.rivals.loop import Training, broadcast
from launch.bench.rivals.ranks import HERE, Places, run_ranks
from launch.bench.rivals.record import RankRun, RivalRun
from pipeline.data.network import layers_for
from pipeline.data.recipe import Recipe
from pipeline.errors import PlanError
from pipeline.messages.bundle import as_value, rows_in
from pipeline.messages.nesting import Nesting
from pipeline.model.optimizers import build_optimizer
from pipeline.model.segment import network_of
from pipeline.run.resolved import Resolved
from pipeline.seeding import derived_seed
from pipeline.stage.evaluation import EvaluationMetrics, scores_of

__all__ = ["DDP", "run_ddp"]


def run_ddp(
    source: Callable[[], Recipe],
    resolved: Resolved,
    *,
    ranks: int,
    threads: int,
    warmup: int,
    within_s: float = 3600.0,
    weights: Path | None = None,
    places: Places = HERE,
) -> RivalRun:
    """Train with DistributedDataParallel over gloo: the same batches as everybody, cut into one slice per rank.

    Gradients are averaged over slices of equal size, which gives the mean over the batch: the learning rate stays.
    Layers that look at the whole batch (BatchNorm) see their rank's slice only, and rank 0's statistics count.
    Each rank looks at its share of the held-out batches. Args as in ``Training``; blocks and fails as ``run_ranks``.

    Raises:
        PlanError: ``ranks`` does not divide the rows of a batch.
    """
    rows = resolved.batch_shape[0]
    if rows % ranks:
        raise PlanError(f"{ranks} ranks for batches of {rows} rows: give a number of ranks that divides the rows.")
    rival, training = DDP(rows // ranks, ranks), Training(source, resolved.plan, warmup, weights=weights)
    return run_ranks("DDP", rival, training, ranks=ranks, threads=threads, within_s=within_s, places=places)


class DDP(msgspec.Struct, tag=True, frozen=True):
    """What a rank does: ``rows`` rows of every batch are its own, of ``ranks`` ranks."""

    rows: int
    ranks: int

    def __call__(self, training: Training, rank: int) -> RankRun:
        """Train, in a process group that stands."""
        recipe, plan = training.source(), training.plan
        layers = layers_for(recipe, plan)
        torch.manual_seed(derived_seed(plan.seed, "rank", rank))  # slices get dropout masks of their own
        network = network_of(layers)
        model = DistributedDataParallel(network)
        optimizer = build_optimizer(plan.optimizer, [p for p in model.parameters() if p.requires_grad], plan.steps)
        assert optimizer is not None, "DDP refuses a model without parameters"
        mine = slice(rank * self.rows, (rank + 1) * self.rows)

        def step(index: int) -> float:
            batch = recipe.seeded_batch(plan.seed, index)
            inputs, labels = (as_value(rows_in(each, mine)) for each in batch.tensors())
            loss = recipe.arranged(Nesting.of(batch.labels)).loss(model(inputs), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        def look() -> EvaluationMetrics:
            for buffer in network.buffers():  # as the next training batch would do
                buffer.copy_(broadcast(buffer, 0))
            return scores_of(recipe, network, first=rank, every=self.ranks)

        return training.run(recipe, rank, step, lambda: layers, look)
