"""The command line of a recipe: the plan's options, the recipe's own, and the run's, side by side."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import docstring_parser
import tyro

from launch.sources import NamedRecipe, entry_of
from pipeline import Plan, Recipe

__all__ = ["BenchOptions", "ChannelOptions", "Parsed", "RunOptions", "parse", "parse_channel"]

_SEED = "seed"  # a recipe's parameter of this name gets the plan's seed


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run goes."""

    runs: Path = Path("runs")
    """Folder of the runs."""
    name: str | None = None
    """Name of the run; default: time, recipe and mode."""
    json: Path | None = None
    """Also write the result to this file."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RunOptions):
    """How to compare."""

    rounds: int = 5
    """Rounds; in each, every mode runs once."""


@dataclass(frozen=True, kw_only=True)
class ChannelOptions:
    """How to measure the shared memory channel."""

    rounds: int = 5
    """Rounds; in each, every size is measured once."""
    slots: int = 4
    """Slots of the channel."""
    json: Path | None = None
    """Also write the rows to this file."""


@dataclass(frozen=True)
class Parsed:
    """What the user asked for."""

    source: NamedRecipe
    plan: Plan
    run: Any


def parse(recipe: str, arguments: Sequence[str], run_type: type[RunOptions], prog: str) -> Parsed:
    """Parse the options behind a recipe's name. Exits with status 2 and one message when they are wrong.

    Raises:
        PlanError: no such recipe.
    """
    entry = entry_of(recipe)
    own = _recipe_options(entry.make)
    fields: list[Any] = [
        ("plan", _flat(Plan), dataclasses.field(default=entry.plan)),
        ("run", _flat(run_type), dataclasses.field(default_factory=run_type)),
    ]
    if dataclasses.fields(own):
        fields.insert(0, ("recipe", _flat(own), *_default(own)))
    options: Any = tyro.cli(
        dataclasses.make_dataclass("Options", fields, kw_only=True),
        prog=f"{prog} {recipe}",
        description=(inspect.getdoc(entry.make) or "").partition("\n")[0],
        args=list(arguments),
        config=(tyro.conf.SuppressFixed,),
    )
    chosen = {f.name: getattr(options.recipe, f.name) for f in dataclasses.fields(own)}
    if _SEED in inspect.signature(entry.make).parameters:
        chosen[_SEED] = options.plan.seed
    return Parsed(NamedRecipe(recipe, tuple(chosen.items())), options.plan, options.run)


def parse_channel(arguments: Sequence[str]) -> ChannelOptions:
    """Parse the options of ``freewheel bench channel``; exits with status 2 when they are wrong."""
    return tyro.cli(ChannelOptions, prog="freewheel bench channel", args=list(arguments))


def _recipe_options(make: Callable[..., Recipe]) -> type:
    """A dataclass with the function's keyword parameters, its docstring as help."""
    help_of = {param.arg_name: param.description for param in docstring_parser.parse(make.__doc__ or "").params}
    fields: list[Any] = []
    for name, parameter in inspect.signature(make, eval_str=True).parameters.items():
        if name == _SEED:
            continue
        kind = _annotated(parameter.annotation, tyro.conf.arg(help=help_of.get(name)))
        if parameter.default is inspect.Parameter.empty:
            fields.append((name, kind))
        else:
            fields.append((name, kind, dataclasses.field(default=parameter.default)))
    return dataclasses.make_dataclass("RecipeOptions", fields, frozen=True, kw_only=True)


def _default(own: type) -> tuple[Any, ...]:
    required = any(f.default is dataclasses.MISSING for f in dataclasses.fields(own))
    return () if required else (dataclasses.field(default_factory=own),)


def _flat(kind: type) -> Any:
    """Options of a nested dataclass without its own name in front."""
    return _annotated(kind, tyro.conf.arg(name=""))


def _annotated(kind: Any, note: Any) -> Any:
    made: Any = Annotated  # types that are only known at run time
    return made[kind, note]
