"""The work of several replicas as one process does it: the batches of a step put together.

replicas    step i    batch 2 i  |  batch 2 i + 1          R batches of n rows, one in each replica
together    step i    batch 2 i and batch 2 i + 1          one batch of R n rows

Locked replicas equal training on global batches, so a benchmark has everybody else train on these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from launch.setup.resolve_source import resolve_source
from pipeline import Plan, Recipe
from pipeline.data.batch import Minibatch, tensors_of_value
from pipeline.messages.bundle import present
from pipeline.messages.nesting import Nesting
from pipeline.plan.replica_layout import batch_of
from pipeline.run.resolved import Resolved

__all__ = ["RecipeSource", "global_batch_recipe", "global_batches"]

RecipeSource = Callable[[], Recipe]


def global_batches(source: RecipeSource, resolved: Resolved) -> tuple[RecipeSource, Resolved]:
    """The same work without replicas. Raises as ``resolve_source``."""
    plan = resolved.plan
    if plan.replicas == 1:
        return source, resolved
    together = partial(global_batch_recipe, source, plan)
    return together, resolve_source(together, replace(plan, replicas=1, average_every=Plan().average_every))


def global_batch_recipe(source: RecipeSource, plan: Plan) -> Recipe:
    """The recipe whose batch i is what all replicas of ``plan`` train on in step i."""
    recipe = source()
    return replace(recipe, batches=partial(_global_batch, recipe, plan))


def _global_batch(recipe: Recipe, plan: Plan, step: int) -> Minibatch:
    numbers = (batch_of(plan, replica, step) for replica in range(plan.replicas))
    batches = [recipe.seeded_batch(plan.seed, number) for number in numbers]
    return Minibatch(*(_joined([batch[part] for batch in batches]) for part in (0, 1)))


def _joined(values: Sequence[Any]) -> Any:
    rows = zip(*map(tensors_of_value, values), strict=True)
    return Nesting.of(values[0]).value([torch.cat([present(each) for each in same]) for same in rows])
