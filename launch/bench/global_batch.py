"""The work of several replicas as one process does it: the batches of a step put together.

replicas    step i    batch 2 i  |  batch 2 i + 1          R batches of n rows, one in each replica
joined      step i    batch 2 i and batch 2 i + 1          one batch of R n rows

Locked replicas equal training on joined batches, so that is what a benchmark has everybody else train on: the same
samples, and as many updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from launch.setup.resolve_source import resolve_source
from pipeline import Batch, Plan, Recipe
from pipeline.plan.replica_layout import batch_of
from pipeline.run.resolved import Resolved

__all__ = ["GlobalBatchRecipe", "RecipeSource", "global_batches"]

RecipeSource = Callable[[], Recipe]
"""Makes a recipe, in any process."""


@dataclass(frozen=True)
class GlobalBatchRecipe:
    """A recipe whose batch i is what all replicas train on in step i.

    Args:
        source: makes the recipe.
        plan: the plan with replicas.
    """

    source: RecipeSource
    plan: Plan

    def __call__(self) -> Recipe:
        """Make the recipe."""
        recipe = self.source()
        return replace(recipe, batches=_Joined(recipe, self.plan))


@dataclass(frozen=True)
class _Joined:
    recipe: Recipe
    plan: Plan

    def __call__(self, step: int) -> Batch:
        numbers = (batch_of(self.plan, replica, step) for replica in range(self.plan.replicas))
        inputs, labels = zip(*(self.recipe.seeded_batch(self.plan.seed, number) for number in numbers), strict=True)
        return torch.cat(inputs), torch.cat(labels)


def global_batches(source: RecipeSource, resolved: Resolved) -> tuple[RecipeSource, Resolved]:
    """The same work without replicas; what there is to do for a run without replicas is nothing.

    Raises:
        PlanError: see ``resolve_source``.
    """
    plan = resolved.plan
    if plan.replicas == 1:
        return source, resolved
    together = GlobalBatchRecipe(source, plan)
    return together, resolve_source(together, replace(plan, replicas=1, average_every=Plan().average_every))
