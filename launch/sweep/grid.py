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

import torch

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

_SAMPLES = 20  # batches of a run whose quality is sampled, where the user does not say


@dataclass(frozen=True)
class Point:
    """One run: the recipe with its seed, the resolved plan, and a hash of both."""

    source: NamedRecipe
    plan: Plan
    key: str


@dataclass(frozen=True)
class Setting:
    """One combination of a row and values. ``plan`` is what is run, resolved, and ``source`` its recipe, both with the
    first seed; ``labels`` has the name of the row, if any, and the values as typed; ``wish`` is what was asked for.
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

    ``axes`` begin with the rows, if any; ``settings`` are in the order of the table; ``first`` is the first of them,
    resolved as it was asked for; ``metric`` is ``error`` or ``loss``.
    """

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
    """The grid of a command line, every point of which can run; PlanError names all that cannot."""
    options: SweepOptions = parsed.run
    axes = read_axes(recipe, parsed, options.vary)
    rows = read_rows(recipe, arguments, options.row, axes)
    seeds = seeds_of(options.seeds)
    assert seeds is not None, "the options are checked"
    shown = ([Axis((ROW,), tuple(row.name for row in rows), ())] if rows else []) + axes
    settings, resolved, idle, problems = [], [], [], list[str]()
    for labels, row, wish in _wishes(parsed, rows, axes):
        try:
            found, without_effect = _resolved(wish)
        except PlanError as error:
            problems += [f"{_named(shown, labels)}{problem}" for problem in error.problems]
            continue
        settings.append(_setting(labels, wish, found.plan, seeds))
        resolved.append(found)
        idle.append((row, without_effect))
    if problems := problems or list(_never_read(rows, idle)) or list(_no_difference(shown, settings)):
        raise PlanError(*dict.fromkeys(problems))
    made = _recipe_of(settings[0].source)
    if (metric := options.metric) is None:  # where every position has an answer of its own, the loss says more
        labels = made.batch(0).labels
        by_row = isinstance(labels, torch.Tensor) and labels.dim() == 1
        metric = "error" if made.correct is not None and by_row else "loss"
    if metric == "error" and made.correct is None:
        raise PlanError(f"metric error: recipe {made.name} counts no right answers; leave it out, or give loss.")
    return Grid(made.name, tuple(shown), seeds, tuple(settings), resolved[0], metric)


def _wishes(
    parsed: Parsed, rows: Sequence[Row], axes: Sequence[Axis]
) -> Iterator[tuple[tuple[str, ...], Row | None, Parsed]]:
    """(labels, row, options) of every combination."""
    owners: Sequence[Row | None] = rows or [None]
    for row in owners:
        for chosen in itertools.product(*(zip(axis.labels, axis.values, strict=True) for axis in axes)):
            wish = row.parsed if row else parsed
            for axis, (_, values) in zip(axes, chosen, strict=True):
                for option, value in zip(axis.options, values, strict=True):
                    wish = with_value(wish, option, value)
            yield (*([row.name] if row else []), *(label for label, _ in chosen)), row, wish


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


def _never_read(rows: Sequence[Row], idle: Sequence[tuple[Row | None, frozenset[NoEffect]]]) -> Iterator[str]:
    """Options that have no effect anywhere, or in a row nowhere of those that it gives itself."""
    everywhere = [here for _, here in idle]
    first = {sentence.option: sentence for sentence in everywhere[0]}
    yield from dict.fromkeys(first[sentence.option] for sentence in _in_all(everywhere))
    for row in rows:
        for sentence in _in_all([here for owner, here in idle if owner is row]):
            if any(o == sentence.option or o.startswith(f"{sentence.option}.") for o in row.options):
                yield f"row {row.name}: {sentence}"


def _in_all(idle: Sequence[frozenset[NoEffect]]) -> Iterator[NoEffect]:
    """The sentences about options that have no effect in any of these settings."""
    for sentence in sorted(frozenset.union(*idle)):
        if all(any(other.option == sentence.option for other in here) for here in idle):
            yield sentence


def _no_difference(axes: Sequence[Axis], settings: Sequence[Setting]) -> Iterator[str]:
    """Axes along which nothing changes."""
    for index, axis in enumerate(axes):
        along: dict[tuple[str, ...], set[str]] = {}
        for setting in settings:
            others = (*setting.labels[:index], *setting.labels[index + 1 :])
            along.setdefault(others, set()).update(point.key for point in setting.points.values())
        seeds = len(settings[0].points)
        if len(axis.labels) > 1 and all(len(keys) == seeds for keys in along.values()):
            name, same = axis.name.replace(",", " and "), ", ".join(axis.labels)
            yield f"{name} has no effect here: {same} are one and the same run; leave it out."


def _setting(labels: tuple[str, ...], wish: Parsed, plan: Plan, seeds: Sequence[int]) -> Setting:
    plan, name, points = _as_run(plan), wish.source.name, {}
    for seed in seeds:
        options = {option: seed if option == "seed" else value for option, value in wish.source.options}
        own = replace(plan, seed=seed)
        known = {"recipe": name, "options": {key: str(value) for key, value in options.items()}, "plan": own.as_dict()}
        text = json.dumps(known, sort_keys=True, default=str)
        key = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        points[seed] = Point(NamedRecipe(name, tuple(options.items())), own, key)
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
    plan = replace(plan, stages=1, sizes=(sum(plan.sizes or ()),), hop_steps=0.0, channel=ChannelPlan())
    if plan.microbatches > 1:
        return plan
    return replace(plan, mode="naive", targets=Plan.targets, mix=Plan.mix, in_flight="stages", dni=DNIPlan())


def _named(axes: Sequence[Axis], labels: Sequence[str]) -> str:
    """``mode unlocked, stages 9: `` in front of what is wrong there."""
    text = ", ".join(f"{axis.name.replace(',', ' and ')} {label}" for axis, label in zip(axes, labels, strict=True))
    return f"{text}: " if text else ""


@cache
def _recipe_of(source: Callable[[], Recipe]) -> Recipe:
    return source()
