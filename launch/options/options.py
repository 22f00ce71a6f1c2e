"""The command line of a recipe: the plan's options, the recipe's own, and the run's, side by side."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from launch.results.run_folder import name_problems
from launch.setup.recipe_source import NamedRecipe, entry_of
from pipeline import DNIPlan, OptimizerPlan, Plan, PlanError, Recipe
from pipeline.plan.check import check_plan
from pipeline.plan.device_choice import CPU, device_problems
from pipeline.plan.names import DNI_FORMS, OPTIMIZERS, SCHEDULES, TARGETS
from pipeline.schedule.modes import MODES

__all__ = [
    "BenchOptions",
    "ChannelOptions",
    "Parsed",
    "RunOptions",
    "count_problems",
    "option_name",
    "parse",
    "parse_channel",
    "recipe_options",
]

_MOST = 10_000  # rounds, slots, runs at a time
_SEED = "seed"  # a recipe's parameter of this name gets the plan's seed
_VALID: dict[type, dict[str, Sequence[str]]] = {
    Plan: {"mode": tuple(MODES), "targets": TARGETS},
    OptimizerPlan: {"rule": OPTIMIZERS, "schedule": SCHEDULES},
    DNIPlan: {"form": DNI_FORMS},
}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run goes."""

    fixed: ClassVar[dict[str, Any]] = {}
    """What the command itself sets in the plan; there are no options for it."""

    runs: Path = Path("runs")
    """Folder of the runs."""
    name: str | None = None
    """Name of the run; default: time, recipe and mode."""
    json: Path | None = None
    """Also write the result to this file."""
    quiet: bool = False
    """Print nothing but errors."""

    def problems(self) -> Iterator[str]:
        """What cannot work, one sentence each."""
        if self.name is not None:
            yield from name_problems(self.name)
        yield from _json_problems(self.json)


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RunOptions):
    """How to compare."""

    fixed: ClassVar[dict[str, Any]] = {"mode": "unlocked", "microbatches": 1, "spans": True}

    rows: tuple[str, ...] = ("backprop", "naive", "unlocked")
    """Rows: backprop, backprop-all-cores, ddp, torch-gpipe, torch-1f1b, torch-interleaved-1f1b,
    torch-interleaved-zero-bubble, torch-zbv-zero-bubble, our modes, async-1f1b-nadamw (with Nesterov momentum and
    learning-rate warm-up), or all."""
    rounds: int = 5
    """Rounds; in each, every row runs once."""
    quality: bool = True
    """Run unlocked once more after the rounds, and compare its synthetic gradients with the true ones."""
    over_stages: tuple[int, ...] = ()
    """Compare at these numbers of stages too, e.g. 1 2 4 8: throughput and update latency over the number of stages."""
    over_latency_ms: tuple[float, ...] = ()
    """Compare with links of these latencies too, e.g. 0 10 50 100; links are emulated then, as with --link."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from count_problems(rounds=self.rounds)
        if self.over_stages and self.over_latency_ms:
            yield "over_stages and over_latency_ms are both given: compare over one of them at a time."
        limits = ("stages", self.over_stages, 1, _MOST), ("latency_ms", self.over_latency_ms, 0, 3.6e6)
        for name, values, least, most in limits:
            if wrong := [value for value in values if not value >= least]:
                yield f"over_{name} has {wrong[0]:g}: every one must be at least {least}."
            if wrong := [value for value in values if value > most]:
                yield f"over_{name} has {str(wrong[0])[:40]}: every one must be at most {most:,.0f}."


@dataclass(frozen=True, kw_only=True)
class ChannelOptions:
    """How to measure one hop over each kind of channel."""

    rounds: int = 5
    """Rounds; in each, every size is measured once."""
    slots: int = 4
    """Slots of each channel."""
    device: str = CPU
    """Where the tensors are: cpu, cuda, or one or two devices like cuda:0,cuda:1."""
    json: Path | None = None
    """Also write the rows to this file."""

    def problems(self) -> Iterator[str]:
        yield from count_problems(rounds=self.rounds, slots=self.slots)
        yield from device_problems(self.device)
        yield from _json_problems(self.json)


@dataclass(frozen=True)
class Parsed:
    """What the user asked for."""

    source: NamedRecipe
    plan: Plan
    run: Any


def parse(
    recipe: str, arguments: Sequence[str], run_type: type[RunOptions], prog: str, *, writes: bool = True
) -> Parsed:
    """Parse what the user gave ``prog`` behind a recipe's name: options of the plan, of the recipe, and of the run.

    Exits with status 2 and one message when they cannot be read. PlanError: no such recipe, or values that cannot work;
    all are checked at once, if this process writes what the run leaves.
    """
    entry = entry_of(recipe)
    given = {option_name(argument) for argument in arguments}
    for name in run_type.fixed:
        if name in given:
            raise PlanError(f"{name} has no effect in {prog}, which chooses it: leave it out.")
    own = recipe_options(entry.make)
    taken = {f.name for other in (Plan, run_type) for f in dataclasses.fields(other)}
    if clash := [f.name for f in dataclasses.fields(own) if f.name in taken]:
        raise PlanError(f"recipe() in {recipe} has parameters that Freewheel has too: rename {', '.join(clash)}.")
    fields: list[Any] = [
        ("plan", _flat(Plan), field(default=dataclasses.replace(entry.plan, **run_type.fixed))),
        ("run", _flat(run_type), field(default_factory=run_type)),
    ]
    if options_of_recipe := dataclasses.fields(own):
        required = any(f.default is dataclasses.MISSING for f in options_of_recipe)
        fields.insert(0, ("recipe", _flat(own), *([] if required else [field(default_factory=own)])))
    with _rules(run_type):
        options: Any = tyro.cli(
            dataclasses.make_dataclass("Options", fields, kw_only=True),
            prog=f"{prog} {recipe}",
            description=(inspect.getdoc(entry.make) or "").partition("\n")[0],
            args=list(arguments),
            config=(tyro.conf.SuppressFixed,),
        )
    if writes:
        _check(options.run, options.plan)
    chosen = {f.name: getattr(options.recipe, f.name) for f in options_of_recipe}
    if _SEED in inspect.signature(entry.make).parameters:
        chosen[_SEED] = options.plan.seed
    return Parsed(NamedRecipe(recipe, tuple(chosen.items())), options.plan, options.run)


def parse_channel(arguments: Sequence[str]) -> ChannelOptions:
    """Parse the options of ``freewheel bench channel``; exits with status 2, or raises PlanError, if they are wrong."""
    options = tyro.cli(ChannelOptions, prog="freewheel bench channel", args=list(arguments))
    _check(options)
    return options


def option_name(argument: str) -> str | None:
    """The field that an argument sets: ``stall_after_s`` for --stall-after-s=9, ``spans`` for --no-spans."""
    if not argument.startswith("--"):
        return None
    *owner, name = argument.partition("=")[0].removeprefix("--").replace("-", "_").split(".")
    return ".".join((*owner, name.removeprefix("no_")))


def _check(options: RunOptions | ChannelOptions, plan: Plan | None = None) -> None:
    problems: list[str] = []
    try:
        if plan is not None:
            check_plan(plan)
    except PlanError as error:
        problems += error.problems
    if problems := [*problems, *options.problems()]:
        raise PlanError(*problems)


def _json_problems(path: Path | None) -> Iterator[str]:
    """Seen before the run, or its result would be lost after the last batch."""
    if path is None:
        return
    if path.is_dir():
        yield f"json {path} is a folder: give the path of a file."
    elif not path.parent.is_dir():
        yield f"json {path}: there is no folder {path.parent}; make it first, or give another path."
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        yield f"json {path} may not be written: give another path."


def count_problems(**options: int) -> Iterator[str]:
    """Of options that are whole numbers, at least 1: what is wrong with them, one sentence each."""
    for name, value in options.items():
        if value < 1:
            yield f"{name} is {str(value)[:40]}: it must be at least 1."
        elif value > _MOST:
            yield f"{name} is {str(value)[:40]}: it must be at most {_MOST:,}."


def _rules(run_type: type[RunOptions]) -> ConstructorRegistry:
    """How the plan and the run become options: valid names in the help, and no option for what is fixed."""
    registry, ours = ConstructorRegistry(), {*_tree(Plan), *_tree(run_type)}

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type not in ours:
            return None
        hints = get_type_hints(info.type, include_extras=True)
        for name, valid in _VALID.get(info.type, {}).items():
            hints[name] = Annotated[hints[name], tyro.conf.arg(metavar=f"{{{','.join(valid)}}}")]
        help_of: dict[str, str] = {}
        for kind in reversed(info.type.__mro__):  # a docstring of a field stands where the field does
            help_of |= _help_of(docstring_parser.parse_from_object(kind)) if dataclasses.is_dataclass(kind) else {}
        fields = tuple(
            StructFieldSpec(f.name, hints[f.name], getattr(info.default, f.name), helptext=help_of.get(f.name))
            for f in dataclasses.fields(info.type)
            if f.name not in (run_type.fixed if info.type is Plan else ())
        )
        return StructConstructorSpec(partial(dataclasses.replace, info.default), fields)

    return registry


def _tree(kind: type) -> Iterator[type]:
    """A dataclass, and those of its fields."""
    yield kind
    for hint in get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from _tree(hint)  # type: ignore[arg-type]


def recipe_options(make: Callable[..., Recipe]) -> type:
    """A dataclass with the function's keyword parameters, its docstring as help."""
    help_of = _help_of(docstring_parser.parse(make.__doc__ or ""))
    fields: list[Any] = []
    for name, parameter in inspect.signature(make, eval_str=True).parameters.items():
        if name == _SEED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind: Any = parameter.annotation  # or else the type of its default, or a string
        has_default = parameter.default is not inspect.Parameter.empty
        if kind is inspect.Parameter.empty and has_default:
            kind = str | None if parameter.default is None else type(parameter.default)
        kind = Annotated[str if kind is inspect.Parameter.empty else kind, tyro.conf.arg(help=help_of.get(name))]
        fields.append((name, kind, *([field(default=parameter.default)] if has_default else [])))
    return dataclasses.make_dataclass("RecipeOptions", fields, frozen=True, kw_only=True)


def _help_of(docstring: docstring_parser.Docstring) -> dict[str, str]:
    """What is said of every parameter, in one line each, which the terminal breaks."""
    return {param.arg_name: " ".join((param.description or "").split()) for param in docstring.params}


def _flat(kind: type) -> Any:
    """Options of a nested dataclass without its own name in front."""
    return Annotated[kind, tyro.conf.arg(name="")]
