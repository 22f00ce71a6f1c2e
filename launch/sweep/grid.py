"""What a sweep runs: every row with every combination of values and every seed, checked before the first run starts.

settings   rows x values of every axis        what the table shows
points     settings x seeds                   what is run; settings that must learn the same share their points

An option has to have an effect somewhere. At a setting where it has none (``dni.rows`` in mode naive) it is left at its
default: that makes a grid of modes and options of one mode possible at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from launch.options.options import Parsed
from launch.setup.recipe_source import NamedRecipe
from launch.sweep.axes import ROW, Axis, Row, read_axes, read_rows, value_of, with_value
from launch.sweep.options import SweepOptions, seeds_of
from pipeline import ChannelPlan, DNIPlan, Plan, PlanError, Recipe
from pipeline.errors import NoEffect
from pipeline.plan.check import check_plan
from pipeline.run.resolve import resolve
from pipeline.run.resolved import Resolved
from pipeline.schedule.modes import MODES

__all__ = ["Grid", "Point", "Setting", "grid_of"]

_SAMPLES = 20
"""Batches of a run whose synthetic gradients are compared with the true ones, where the user does not say."""


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        source: makes the recipe, with its seed.
        plan: resolved.
        key: hash of both.
    """

    source: NamedRecipe
    plan: Plan
    key: str


@dataclass(frozen=True)
class Setting:
    """One combination of a row and values.

    Attributes:
        labels: one per axis, as typed; the row's name first where there are rows.
        plan: what is run, resolved, with the first seed.
        source: makes the recipe, with the first seed.
        points: by seed.
        wish: the options as they were asked for.
    """

    labels: tuple[str, ...]
    wish: Parsed
    plan: Plan
    source: NamedRecipe
    points: dict[int, Point]

    @property
    def backprop(self) -> bool:
        """Whether it is backpropagation over whole batches, up to the split."""
        return self.plan.mode == "naive" and self.plan.stages == 1


@dataclass(frozen=True)
class Grid:
    """Everything a sweep runs.

    Attributes:
        recipe: name or path, as typed.
        title: name of the recipe.
        axes: the rows, if any, and what is varied.
        seeds: of every setting.
        settings: in the order of the table.
        first: the first setting, resolved as it was asked for.
        metric: ``error`` or ``loss``.
    """

    recipe: str
    title: str
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    settings: tuple[Setting, ...]
    first: Resolved
    metric: str

    @property
    def points(self) -> dict[str, Point]:
        """Every run, once, by its key; those of the first seed come first."""
        ordered = (setting.points[seed] for seed in self.seeds for setting in self.settings)
        return {point.key: point for point in ordered}


def grid_of(recipe: str, arguments: Sequence[str], parsed: Parsed) -> Grid:
    """The grid of a command line; every point of it can run.

    Raises:
        PlanError: an unknown option, or points that cannot run; all of them are named.
    """
    options: SweepOptions = parsed.run
    axes = read_axes(recipe, parsed, options.vary)
    rows = read_rows(recipe, arguments, options.row, axes)
    seeds = seeds_of(options.seeds)
    assert seeds is not None, "the options are checked"
    shown = ([Axis((ROW,), tuple(row.name for row in rows), ())] if rows else []) + axes
    wishes = list(_wishes(parsed, rows, axes))
    resolved, idle, problems = [], [], []
    for labels, _, wish in wishes:
        try:
            found, without_effect = _resolved(wish)
        except PlanError as error:
            problems += [f"{_named(shown, labels)}{problem}" for problem in error.problems]
            continue
        resolved.append(found)
        idle.append(without_effect)
    problems = problems or list(_never_read(rows, [row for _, row, _ in wishes], idle))
    if problems:
        raise PlanError(*dict.fromkeys(problems))
    settings = [
        _setting(labels, wish, found.plan, seeds) for (labels, _, wish), found in zip(wishes, resolved, strict=True)
    ]
    if problems := list(_no_difference(shown, settings)):
        raise PlanError(*problems)
    made = _recipe_of(settings[0].source)
    metric = options.metric or _metric_of(made)
    if metric == "error" and made.correct is None:
        raise PlanError(f"metric error: recipe {made.name} counts no right answers; leave it out, or give loss.")
    return Grid(recipe, made.name, tuple(shown), seeds, tuple(settings), resolved[0], metric)


def _wishes(
    parsed: Parsed, rows: Sequence[Row], axes: Sequence[Axis]
) -> Iterator[tuple[tuple[str, ...], Row | None, Parsed]]:
    """(labels, row, options) of every combination."""
    owners: Sequence[Row | None] = rows or [None]
    for row in owners:
        for places in itertools.product(*(range(len(axis.labels)) for axis in axes)):
            wish = row.parsed if row else parsed
            for axis, place in zip(axes, places, strict=True):
                for option, value in zip(axis.options, axis.values[place], strict=True):
                    wish = with_value(wish, option, value)
            labels = tuple(axis.labels[place] for axis, place in zip(axes, places, strict=True))
            yield ((row.name,) if row else ()) + labels, row, wish


def _resolved(wish: Parsed) -> tuple[Resolved, frozenset[NoEffect]]:
    """The wish without options that have no effect in it, and the sentences about these."""
    recipe = _recipe_of(wish.source)
    without_effect: set[NoEffect] = set()
    steps = wish.plan.steps or recipe.steps
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the user's model, in a trial run
                return resolve(recipe, _sampled(check_plan(wish.plan), steps)), frozenset(without_effect)
        except PlanError as error:
            if not error.idle:
                raise
            without_effect.update(error.idle)
            for sentence in error.idle:
                wish = with_value(wish, sentence.option, value_of(replace(wish, plan=Plan()), sentence.option))


def _sampled(plan: Plan, steps: int) -> Plan:
    """The plan with samples of the quality where there is one and nobody said how often."""
    if plan.quality_every is not None or not plan.unlocked or plan.stages == 1 or plan.update_probability < 1:
        return plan
    return replace(plan, quality_every=max(1, steps // _SAMPLES))


def _never_read(
    rows: Sequence[Row], row_of: Sequence[Row | None], idle: Sequence[frozenset[NoEffect]]
) -> Iterator[str]:
    """Options that have no effect anywhere, or in a row nowhere of those that it gives itself."""
    everywhere = {sentence.option for sentence in frozenset.union(*idle)}
    for option in sorted(everywhere):
        if all(any(sentence.option == option for sentence in here) for here in idle):
            yield next(sentence for sentence in idle[0] if sentence.option == option)
    for row in rows:
        mine = [here for here, owner in zip(idle, row_of, strict=True) if owner is row]
        for sentence in sorted(frozenset.union(*mine)):
            gives = any(o == sentence.option or o.startswith(f"{sentence.option}.") for o in row.options)
            if gives and all(any(other.option == sentence.option for other in here) for here in mine):
                yield f"row {row.name}: {sentence}"


def _no_difference(axes: Sequence[Axis], settings: Sequence[Setting]) -> Iterator[str]:
    """Axes along which nothing changes."""
    for index, axis in enumerate(axes):
        along: dict[tuple[str, ...], set[str]] = {}
        for setting in settings:
            others = (*setting.labels[:index], *setting.labels[index + 1 :])
            along.setdefault(others, set()).update(point.key for point in setting.points.values())
        seeds = len(settings[0].points)
        if len(axis.labels) > 1 and all(len(keys) == seeds for keys in along.values()):
            same = ", ".join(axis.labels)
            yield f"{_axis_name(axis)} has no effect here: {same} are one and the same run; leave it out."


def _setting(labels: tuple[str, ...], wish: Parsed, plan: Plan, seeds: Sequence[int]) -> Setting:
    plan, source, points = _as_run(plan), wish.source, {}
    for seed in seeds:
        own = {**dict(source.options), "seed": seed} if "seed" in dict(source.options) else dict(source.options)
        seeded = NamedRecipe(source.name, tuple(own.items()))
        points[seed] = _point(seeded, replace(plan, seed=seed))
    first = points[seeds[0]]
    return Setting(labels, wish, first.plan, first.source, points)


def _as_run(plan: Plan) -> Plan:
    """A plan that learns the same, bit for bit, and is run once for all that do.

    An exact mode does not depend on the split, and most modes on no delay; a single stage is backpropagation in all.
    """
    if not MODES[plan.mode].timed and plan.in_flight == "stages":
        plan = replace(plan, hop_steps=0.0)
    exact = MODES[plan.mode].exact and plan.wire_dtype is None and plan.optimizer.clip is None
    if not exact and (plan.stages > 1 or plan.microbatches > 1 or plan.update_probability < 1):
        return plan
    whole = {"stages": 1, "sizes": (sum(plan.sizes or ()),), "hop_steps": 0.0, "channel": ChannelPlan()}
    locked = {"mode": "naive", "targets": Plan.targets, "mix": Plan.mix, "in_flight": "stages"}
    changes: dict[str, Any] = {**whole, **({**locked, "dni": DNIPlan()} if plan.microbatches == 1 else {})}
    return replace(plan, **changes)


def _point(source: NamedRecipe, plan: Plan) -> Point:
    options = {name: str(value) for name, value in source.options}
    settings = {"recipe": source.name, "options": options, "plan": plan.as_dict()}
    text = json.dumps(settings, sort_keys=True, default=str)
    return Point(source, plan, hashlib.blake2b(text.encode(), digest_size=12).hexdigest())


def _named(axes: Sequence[Axis], labels: Sequence[str]) -> str:
    """``mode unlocked, stages 9: `` in front of what is wrong there."""
    text = ", ".join(f"{_axis_name(axis)} {label}" for axis, label in zip(axes, labels, strict=True))
    return f"{text}: " if text else ""


def _axis_name(axis: Axis) -> str:
    return axis.name.replace(",", " and ")


def _metric_of(recipe: Recipe) -> str:
    """The error where every sample has one answer; where every position has, the loss says more."""
    return "error" if recipe.correct is not None and recipe.batch(0)[1].dim() == 1 else "loss"


@cache
def _recipe_of(source: Callable[[], Recipe]) -> Recipe:
    return source()
