"""What a sweep varies: options by the names they have on the command line, and rows of options that belong together.

--vary hop-steps=0,1,4              one axis of three values
--vary layers,stages=3,4,5          one axis whose value two options take
--row 'cDNI: --dni.form linear'     one of the values of the axis "row"
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from launch.options.options import Parsed, option_name, parse, recipe_options
from launch.setup.recipe_source import NamedRecipe, entry_of
from launch.sweep.options import SweepOptions
from pipeline import Plan, PlanError, nearest

__all__ = ["ROW", "Axis", "Row", "arguments_for", "option_types", "read_axes", "read_rows", "value_of", "with_value"]

ROW = "row"  # name of the axis of the rows


@dataclass(frozen=True)
class Axis:
    """Fields of the plan (``hop_steps``, ``dni.form``) or of the recipe that are varied together.

    ``labels`` are the values as they were typed; ``values`` has for each of them one per option.
    """

    options: tuple[str, ...]
    labels: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    @property
    def name(self) -> str:
        """As typed: ``hop-steps``, ``layers,stages``."""
        return ",".join(map(_typed, self.options))

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The values of an axis of numbers."""
        try:
            return tuple(map(float, self.labels))
        except ValueError:
            return None

    @property
    def places(self) -> tuple[float, ...]:
        """Where the values stand in a picture; those without numbers at 0, 1, 2 ..."""
        return self.numbers or tuple(map(float, range(len(self.labels))))


@dataclass(frozen=True)
class Row:
    """Options under one name: the fields it gives, and the command's options with its own on top."""

    name: str
    options: frozenset[str]
    parsed: Parsed


def option_types(recipe: str) -> dict[str, Any]:
    """Every field that can be varied: of the recipe, then of the plan but for what a sweep chooses itself."""
    types = {f.name: f.type for f in dataclasses.fields(recipe_options(entry_of(recipe).make))}
    for name, kind in get_type_hints(Plan).items():
        inner = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        types.update({f"{name}.{field}": each for field, each in inner.items()} or {name: kind})
    left_out = {*SweepOptions.fixed, "dni.factory"}  # the latter is for Python only
    return {name: kind for name, kind in types.items() if name not in left_out}


def read_axes(recipe: str, parsed: Parsed, texts: Sequence[str]) -> list[Axis]:
    """The axes of ``--vary``, or PlanError: no such option, the same one twice, or no values.

    A value of the wrong kind ends the program with status 2, as it does on the command line.
    """
    types = option_types(recipe)
    split = [_split(text, types) for text in texts]
    names = [name for options, _ in split for name in options]
    if twice := sorted({_typed(name) for name in names if names.count(name) > 1}):
        raise PlanError(f"{', '.join(twice)} is varied twice: give all its values in one --vary.")
    axes = []
    for options, labels in split:
        values = tuple(tuple(_value(option, types[option], label) for option in options) for label in labels)
        axes.append(Axis(options, labels, values))
    return axes


def read_rows(recipe: str, arguments: Sequence[str], texts: Sequence[str], axes: Sequence[Axis]) -> list[Row]:
    """The rows of ``--row``; PlanError: one has no name of its own, or gives what is varied, or no option of a run."""
    rows: list[Row] = []
    varied = {option for axis in axes for option in axis.options}
    not_for_a_row = {f.name for f in dataclasses.fields(SweepOptions)} - option_types(recipe).keys()
    for text in texts:
        name, colon, typed = (part.strip() for part in text.partition(":"))
        if not colon or not name or name in {row.name for row in rows}:
            raise PlanError(f"row {text!r}: give every row a name of its own, e.g. 'cDNI: --dni.form linear'.")
        try:
            own = shlex.split(typed)
        except ValueError as error:
            raise PlanError(f"row {text!r} cannot be read: {error}.") from error
        options = frozenset(option for argument in own if (option := option_name(argument)) is not None)
        if both := sorted(map(_typed, options & varied)):
            raise PlanError(f"row {name} gives {', '.join(both)}, which is varied too: leave it out of one of them.")
        if other := sorted(map(_typed, options & not_for_a_row)):
            raise PlanError(f"row {name} gives {', '.join(other)}, which is one for the whole sweep: give it outside.")
        _refuse_fixed(options, f"row {name}")
        # Not checked yet: an option may have an effect with some of the values only.
        parsed = parse(recipe, [*arguments, *own], SweepOptions, "freewheel sweep", writes=False)
        rows.append(Row(name, options, parsed))
    return rows


def value_of(parsed: Parsed, option: str) -> Any:
    """The value of a field of the recipe or of the plan."""
    given = dict(parsed.source.options)
    return given[option] if option in given else attrgetter(option)(parsed.plan)


def with_value(parsed: Parsed, option: str, value: Any) -> Parsed:
    """The same with another value of a field."""
    given = dict(parsed.source.options)
    if option in given:
        source = NamedRecipe(parsed.source.name, tuple({**given, option: value}.items()))
        return dataclasses.replace(parsed, source=source)
    owner, _, name = option.rpartition(".")
    if owner:
        name, value = owner, dataclasses.replace(getattr(parsed.plan, owner), **{name: value})
    return dataclasses.replace(parsed, plan=dataclasses.replace(parsed.plan, **{name: value}))


def arguments_for(parsed: Parsed, left_out: Sequence[str]) -> list[str]:
    """The shortest options that give these values."""
    recipe, entry = parsed.source.name, entry_of(parsed.source.name)
    defaults = {f.name: f.default for f in dataclasses.fields(recipe_options(entry.make))}
    arguments = []
    for option in option_types(recipe):
        value = value_of(parsed, option)
        default = defaults[option] if option in defaults else attrgetter(option)(entry.plan)
        if value == default or option in left_out:
            continue
        *owner, name = _typed(option).split(".")
        if isinstance(value, bool):
            arguments.append("--" + ".".join((*owner, name if value else f"no-{name}")))
        else:
            words = value if isinstance(value, tuple) else (value,)
            arguments += [f"--{_typed(option)}", *map(str, words)]
    return arguments


def _split(text: str, valid: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields and the values as typed."""
    left, equals, right = text.partition("=")
    options = tuple(name.strip().replace("-", "_") for name in left.split(","))
    labels = tuple(" ".join(label.split()) for label in right.split(","))
    if not equals or not all(options) or not all(labels):
        raise PlanError(f"vary {text!r}: give an option and its values, e.g. hop-steps=0,1,4.")
    _refuse_fixed(options, "vary")
    for option in options:
        if option not in valid:
            raise PlanError(nearest(_typed(option), map(_typed, valid), "option in vary"))
    if len(set(labels)) < len(labels):
        raise PlanError(f"vary {text!r} gives a value twice: leave one of them out.")
    return options, labels


def _refuse_fixed(options: Collection[str], where: str) -> None:
    if "seed" in options:
        raise PlanError(f"{where}: seeds are given with --seeds, e.g. --seeds 0,1,2.")
    for option in options:
        if option in SweepOptions.fixed:
            raise PlanError(f"{where}: {_typed(option)} has no effect in the reference driver: leave it out.")


def _value(option: str, kind: Any, label: str) -> Any:
    """The value that a text stands for, as on the command line."""
    if bool in (kind, *get_args(kind)):  # on the command line these are --name and --no-name
        if label not in ("true", "false"):
            raise PlanError(f"vary {_typed(option)}: {label!r} is neither true nor false.")
        return label == "true"
    made: Any = Annotated
    only = dataclasses.make_dataclass("Value", [("value", made[kind, tyro.conf.arg(name=_typed(option))])])
    return tyro.cli(only, prog="freewheel sweep --vary", args=[f"--{_typed(option)}", *label.split()]).value


def _typed(option: str) -> str:
    return option.replace("_", "-")
