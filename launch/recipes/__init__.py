"""The built-in recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from launch.recipes.chargpt import chargpt
from launch.recipes.cnn import cnn
from launch.recipes.digits import digits
from launch.recipes.mlp import mlp
from launch.recipes.mnist import mnist
from pipeline import OptimizerPlan, Plan, Recipe

__all__ = ["BUILT_IN", "Entry"]


@dataclass(frozen=True)
class Entry:
    """How a recipe is made, by keyword parameters which are its options; and defaults for the plan's options."""

    make: Callable[..., Recipe]
    plan: Plan = field(default_factory=Plan)


BUILT_IN: dict[str, Entry] = {
    "digits": Entry(digits),
    "mnist": Entry(mnist),
    "cnn": Entry(cnn),
    "chargpt": Entry(chargpt),
    "mlp": Entry(mlp, Plan(optimizer=OptimizerPlan(rule="sgd", lr=0.01))),
}
"""Recipes by name."""
