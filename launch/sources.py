"""Where a recipe comes from: a built-in name, a user's file, or the functions given to ``train``.

A source is a small value that travels to the workers, and every worker makes the recipe from it for itself.
"""

from __future__ import annotations

import functools
import importlib.util
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from launch.recipes import BUILT_IN, Entry
from pipeline import Plan, PlanError, Recipe, nearest

__all__ = ["GivenRecipe", "NamedRecipe", "check_travels", "entry_of"]


@dataclass(frozen=True)
class NamedRecipe:
    """A built-in recipe or a Python file, with its options.

    Args:
        name: a built-in name, or the path of a file that defines ``recipe(**options) -> Recipe``, or just ``model()``,
            ``batches(step)`` and ``loss(output, labels)`` (and ``evaluation()``,
            ``correct(output, labels)``, and ``plan``, a Plan with the defaults it suggests).
        options: values for the recipe's own options.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> Recipe:
        """Make the recipe.

        Raises:
            PlanError: no such recipe, or it refuses its options.
        """
        return entry_of(self.name).make(**dict(self.options))


@dataclass(frozen=True)
class GivenRecipe:
    """A recipe that was put together in Python."""

    recipe: Recipe

    def __call__(self) -> Recipe:
        """The recipe itself."""
        return self.recipe


def entry_of(name: str) -> Entry:
    """The function that makes a recipe, whose keyword parameters are its options, and the plan it suggests.

    Raises:
        PlanError: no such recipe.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.endswith(".py"):
        return _file_entry(Path(name).resolve())
    raise PlanError(nearest(name, BUILT_IN, "recipe")[:-1] + ", or the path of a .py file.")


def check_travels(source: Callable[[], Recipe]) -> None:
    """Refuse a source that a worker process could not make again.

    Raises:
        PlanError: a function that cannot be imported by name.
    """
    try:
        pickle.dumps(source)
    except Exception as error:
        raise PlanError(
            f"model, batches and loss must be functions at the top level of a module, so that each worker can "
            f"import them ({error})."
        ) from error


@functools.cache
def _file_entry(path: Path) -> Entry:
    if not path.is_file():
        raise PlanError(f"no recipe file {path}: give the path of a Python file, or one of {', '.join(BUILT_IN)}.")
    module = _imported(path)
    plan = getattr(module, "plan", Plan())
    if hasattr(module, "recipe"):
        return Entry(module.recipe, plan)
    missing = [name for name in ("model", "batches", "loss") if not hasattr(module, name)]
    if missing:
        raise PlanError(
            f"{path} defines no {', '.join(missing)}: a recipe file needs model(), batches(step) and "
            "loss(output, labels), or recipe() -> Recipe."
        )

    def recipe() -> Recipe:
        return Recipe(
            name=path.stem,
            model=module.model,
            batches=module.batches,
            loss=module.loss,
            evaluation=getattr(module, "evaluation", None),
            correct=getattr(module, "correct", None),
        )

    return Entry(recipe, plan)


def _imported(path: Path) -> ModuleType:
    name = f"freewheel_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file has a spec"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # a recipe may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PlanError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module
