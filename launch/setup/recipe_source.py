"""Where a recipe comes from: a built-in name, a user's file, or the functions given to ``train``.

A source is a small value that travels to the workers, and every worker makes the recipe from it for itself.
"""

from __future__ import annotations

import functools
import importlib.util
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load, save

from launch.recipes import BUILT_IN, Entry
from pipeline import Batch, Plan, PlanError, Recipe, nearest
from pipeline.data.user_code import calling, place_of
from pipeline.wording import said

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
            PlanError: no such recipe, it refuses its options, or what it makes is no Recipe.
        """
        make = entry_of(self.name).make
        with calling("recipe()"):
            made: object = make(**dict(self.options))
        if not isinstance(made, Recipe):
            raise PlanError(f"recipe() in {self.name} gives a {type(made).__name__}: return a pipeline.Recipe.")
        return made


@dataclass(frozen=True)
class GivenRecipe:
    """A recipe that was put together in Python. A list of batches travels by value."""

    recipe: Recipe

    def __call__(self) -> Recipe:
        """The recipe itself."""
        return self.recipe

    def __reduce__(self) -> tuple[Any, ...]:
        batches: Any = self.recipe.batches
        if isinstance(batches, list | tuple):
            batches = _ByValue(batches)
        return GivenRecipe, (replace(self.recipe, batches=batches),)


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
        PlanError: a function that cannot be imported by name, or a program that cannot be imported at all.
    """
    main = sys.modules["__main__"]
    file, named = getattr(main, "__file__", None), getattr(main, "__spec__", None) is not None
    if file is not None and not named and not Path(file).is_file():
        raise PlanError(f"the program comes from {file}, and every worker imports it: save it as a .py file, run that.")
    if isinstance(source, GivenRecipe) and isinstance(source.recipe.batches, list | tuple):
        source = GivenRecipe(replace(source.recipe, batches=()))  # tensors always travel; they are not packed twice
    try:
        content = pickle.dumps(source)
    except Exception as error:
        raise PlanError(
            f"model, batches and loss must be functions at the top level of a module, so that each worker can "
            f"import them ({error})."
        ) from error
    if file is None and not named and b"__main__" in content:
        raise PlanError(
            "model, batches or loss is defined in a program that has no file (python -c, or an interactive session), "
            "and no worker can import it from there: put it into a .py file, and import it."
        )


class _ByValue:
    """A list of batches on its way to another process: safetensors bytes, a list again on arrival.

    torch would share every tensor instead, two open files per batch: 128 batches are more than a fork server takes.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __reduce__(self) -> tuple[Any, ...]:
        tensors = {f"{index}.{part}": t for index, batch in enumerate(self._batches) for part, t in enumerate(batch)}
        # Copies, as batches may be views of one another, or the labels the inputs; safetensors refuses those.
        bare = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        return _batches_from, (save(bare), len(self._batches))


def _batches_from(content: bytes, num_batches: int) -> list[Batch]:
    tensors = load(content)
    return [(tensors[f"{index}.0"], tensors[f"{index}.1"]) for index in range(num_batches)]


@functools.cache
def _file_entry(path: Path) -> Entry:
    if not path.is_file():
        raise PlanError(f"no recipe file {path}: give the path of a Python file, or one of {', '.join(BUILT_IN)}.")
    module = _imported(path)
    plan = getattr(module, "plan", Plan())
    if not isinstance(plan, Plan):
        raise PlanError(f"plan in {path} is a {type(plan).__name__}: give a pipeline.Plan, or leave it out.")
    if hasattr(module, "recipe"):
        if not callable(module.recipe):
            raise PlanError(
                f"recipe in {path} is a {type(module.recipe).__name__}: define a function recipe() -> Recipe."
            )
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
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # a recipe may import what lies beside it, later too
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        what = f"{said(error)}{place_of(error)}"
        raise PlanError(f"{path} cannot be imported: {what}") from error
    return module
