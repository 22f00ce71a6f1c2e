"""Where a recipe comes from: a built-in name, a user's file, or the functions given to ``train``.

A source is a value that travels to the workers, and every worker makes the recipe from it for itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import cloudpickle
import torch
from safetensors.torch import load, save

from freewheel import clash
from launch.recipes import BUILT_IN, Entry
from pipeline import Plan, PlanError, Recipe, nearest
from pipeline.data.batch import plain_batch, tensors_of_value
from pipeline.messages.bundle import present
from pipeline.messages.nesting import Nesting
from pipeline.user_code import calling, place_of
from pipeline.wording import said

__all__ = ["GivenRecipe", "NamedRecipe", "PackedRecipe", "being_loaded", "check_travels", "entry_of"]


@dataclass(frozen=True)
class NamedRecipe:
    """A built-in recipe or a Python file, with values for its options.

    The file defines ``recipe(**options) -> Recipe``, or just ``model()``, ``batches(step)`` and ``loss(output,
    labels)`` (and ``evaluation()``, ``correct(output, labels)``, and ``plan``, a Plan with the defaults it suggests).
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> Recipe:
        """Make the recipe, or raise PlanError."""
        make = entry_of(self.name).make
        with calling("recipe()"):
            made: object = make(**dict(self.options))
        if not isinstance(made, Recipe):
            raise PlanError(f"recipe() in {self.name} gives a {type(made).__name__}: return a freewheel.Recipe.")
        return made


@dataclass(frozen=True)
class GivenRecipe:
    """A recipe that was put together in Python. On its way to another process it is a ``PackedRecipe``."""

    recipe: Recipe

    def __call__(self) -> Recipe:
        """The recipe itself."""
        return self.recipe

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedRecipe, (self.functions, self.batches, self.layouts)

    @cached_property
    def functions(self) -> bytes:
        """All but a list of batches, pickled when first asked for; PlanError: something in them cannot be copied."""
        recipe = replace(self.recipe, batches=()) if isinstance(self.recipe.batches, list | tuple) else self.recipe
        try:
            return _pickled(recipe)
        except Exception as error:
            parts = [field.name for field in fields(recipe) if not _can_be_pickled(getattr(recipe, field.name))]
            raise PlanError(
                f"{' and '.join(parts) or 'the recipe'} cannot be handed to the workers, which get a copy of each "
                f"function with the values that it reads ({error}): make what cannot be copied, such as an open file, "
                "a lock or a generator, inside of the function."
            ) from error

    @cached_property
    def batches(self) -> bytes | None:
        """A list of batches in safetensors bytes, or None.

        torch would share every tensor, two open files per batch: 128 batches are more than a fork server takes.
        """
        batches: Any = self.recipe.batches
        if not isinstance(batches, list | tuple):
            return None
        # Copies, as batches may be views of one another, or the labels the inputs; safetensors refuses those.
        parts = (
            (f"{index}.{part}", present(tensor))
            for index, batch in enumerate(batches)
            for part, tensor in enumerate(tensors_of_value(plain_batch(batch)))
        )
        return save({name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in parts})

    @cached_property
    def layouts(self) -> list[Nesting]:
        """How the tensors of a list of batches lie in each; where all are alike, one for all of them."""
        batches: Any = self.recipe.batches
        if not isinstance(batches, list | tuple):
            return []
        found = [Nesting.of(plain_batch(batch)) for batch in batches]
        return found[:1] if all(layout == found[0] for layout in found) else found


@dataclass(frozen=True)
class PackedRecipe:
    """A ``GivenRecipe`` in a child of the process that it was given to, from whom it came over a private pipe.

    What is defined in ``__main__``, or in no module, is pickled by value, with the values that it reads; all else is
    imported by name. ``batches``: a list of them in safetensors bytes; None: ``functions`` has what gives them.
    """

    functions: bytes
    batches: bytes | None
    layouts: Sequence[Nesting] = ()

    def __call__(self) -> Recipe:
        """Make the recipe, or raise PlanError: what belongs to it cannot be imported or made in this process."""
        try:
            with _loading():
                recipe: Recipe = pickle.loads(self.functions)
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(
                f"what train() was given cannot be made in a worker ({type(error).__name__}: {error}"
                f"{place_of(error)}): workers import modules by their names, from where this program finds them."
            ) from error
        if self.batches is None:
            return recipe
        tensors, batches = load(self.batches), list[Any]()
        layouts = iter(self.layouts) if len(self.layouts) > 1 else itertools.repeat(*self.layouts)
        while f"{len(batches)}.0" in tensors:
            layout = next(layouts)
            batches.append(layout.value([tensors[f"{len(batches)}.{part}"] for part in range(layout.count)]))
        return replace(recipe, batches=batches)


def entry_of(name: str) -> Entry:
    """How a recipe is made, and the plan it suggests; PlanError: there is no such recipe."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.endswith(".py"):
        return _file_entry(Path(name).resolve())
    raise PlanError(nearest(name, BUILT_IN, "recipe")[:-1] + ", or the path of a .py file.")


def check_travels(source: Callable[[], Recipe]) -> None:
    """Refuse a source whose functions read something that cannot be copied; what they read travels as it is now."""
    if isinstance(source, GivenRecipe):
        _ = source.functions


def being_loaded() -> bool:
    """Whether this process is importing modules to make a recipe of them."""
    return _loads > 0


_loads = 0


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    global _loads
    _loads += 1
    try:
        yield
    finally:
        _loads -= 1


def _pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def _taken_apart(cached: Any) -> str | tuple[Any, ...]:
    """A function under ``functools.cache``, which pickle only knows by name: by value, without what it has cached."""
    found: Any = sys.modules.get(cached.__module__) if cached.__module__ != "__main__" else None
    for name in cached.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is cached:
        return str(cached.__qualname__)
    return _cached, (cached.__wrapped__, cached.cache_parameters())


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    dispatch_table: ClassVar = ChainMap(
        {functools._lru_cache_wrapper: _taken_apart}, cloudpickle.Pickler.dispatch_table
    )


def _can_be_pickled(value: object) -> bool:
    try:
        _pickled(value)
    except Exception:
        return False
    return True


@functools.cache
def _file_entry(path: Path) -> Entry:
    if not path.is_file():
        raise PlanError(f"no recipe file {path}: give the path of a Python file, or one of {', '.join(BUILT_IN)}.")
    module = _imported(path)
    plan = getattr(module, "plan", Plan())
    if not isinstance(plan, Plan):
        raise PlanError(f"plan in {path} is a {type(plan).__name__}: give a freewheel.Plan, or leave it out.")
    if hasattr(module, "recipe"):
        if not callable(module.recipe):
            kind = type(module.recipe).__name__
            raise PlanError(f"recipe in {path} is a {kind}: define a function recipe() -> Recipe.")
        return Entry(module.recipe, plan)
    if missing := [name for name in ("model", "batches", "loss") if not hasattr(module, name)]:
        raise PlanError(
            f"{path} defines no {', '.join(missing)}: a recipe file needs model(), batches(step) and "
            "loss(output, labels), or recipe() -> Recipe."
        )
    optional: dict[str, Any] = {name: getattr(module, name, None) for name in ("evaluation", "correct")}

    def recipe() -> Recipe:
        return Recipe(name=path.stem, model=module.model, batches=module.batches, loss=module.loss, **optional)

    return Entry(recipe, plan)


def _imported(path: Path) -> ModuleType:
    if (why := clash(path)) is not None:
        raise PlanError(why)
    name = f"freewheel_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file has a spec"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # a recipe may import what lies beside it, later too
    try:
        with _loading():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise PlanError(f"{path} cannot be imported: {said(error)}{place_of(error)}") from error
    return module
