"""What is wrong with a plan: one sentence per mistake, all of them at once, before anything starts.

unknown names -> numbers out of range -> what contradicts itself -> what would have no effect
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from operator import attrgetter
from typing import Any

from pipeline.errors import NoEffect, PlanError, nearest
from pipeline.plan.channel_choice import CHANNELS
from pipeline.plan.device_choice import CPU, device_problems
from pipeline.plan.emulation import Emulation, Link
from pipeline.plan.goal import Goal
from pipeline.plan.names import DNI_FORMS, DTYPES, OPTIMIZERS, SCHEDULES, TARGETS
from pipeline.plan.plan import ChannelPlan, DNIPlan, OptimizerPlan, Plan
from pipeline.schedule.modes import MODES, Mode

__all__ = ["check_plan"]

_MANY, _MOST_WORKERS, _LONG, _LARGE = 2**31 - 1, 10_000, 10**6, 10**9
_Range = tuple[type, Callable[[Any], bool], str, float]


def _count(least: int, most: int) -> _Range:
    return Integral, (lambda n: n >= least), f"it must be a whole number, at least {least}.", most


_AT_LEAST_0 = Real, (lambda x: x >= 0), "it must be a number, at least 0."
_POSITIVE = Real, (lambda x: x > 0), "it must be a positive number."
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(("stages", "replicas"), _count(1, _MOST_WORKERS)),
    **dict.fromkeys(("average_every", "microbatches"), _count(1, _MANY)),
    "steps": _count(1, 10**12),
    **dict.fromkeys(("evaluate_every", "quality_every", "dni.every"), _count(1, _MANY)),
    "threads": _count(1, 1024),
    "dni.hidden": _count(1, 2**20),
    **dict.fromkeys(("channel.slots", "channel.gradient_slots"), _count(1, 2**16)),
    **dict.fromkeys(("warmup_steps", "optimizer.warmup_steps"), _count(0, _MANY)),
    "seed": _count(0, 2**63 - 1),
    "hop_steps": (*_AT_LEAST_0, _LONG),
    **dict.fromkeys(("optimizer.momentum", "optimizer.weight_decay"), (*_AT_LEAST_0, _LARGE)),
    **dict.fromkeys(("optimizer.lr", "dni.lr"), (*_POSITIVE, _LARGE)),
    "stall_after_s": (*_POSITIVE, _LONG),
    "optimizer.clip": (Real, lambda x: x > 0, "it must be a positive number, or None.", _LARGE),
    "dni.temperature": (Real, lambda x: x >= 1, "give a number of at least 1.", _LARGE),
    "dni.rows": (Real, lambda x: 0 < x <= 1, "give the fraction of the rows to train on, in (0, 1].", 1),
    "update_probability": (Real, lambda x: 0 < x <= 1, "give the share of batches to update from, in (0, 1].", 1),
    "unlock_cosine": (Real, lambda x: 0 < x <= 1, "it must lie in (0, 1].", 1),
    "mix": (Real, lambda x: 0 <= x <= 1, "it weighs the true gradient and must lie in [0, 1].", 1),
}
"""What every number has to be, the same in words, and the most: beyond, something overflows or takes all memory."""
_DEFAULTS = Plan()
_SHOWN = 40  # characters of a wrong value
_LOCKING = ("warmup_steps", "unlock", "unlock_cosine")


def check_plan(plan: Plan) -> Plan:
    """Return ``plan`` if it can run, or raise PlanError with one sentence per mistake, which says what to do."""
    if problems := list(_wrong_kinds(plan)) or list(_problems(plan)):
        raise PlanError(*problems)
    return plan


def _problems(plan: Plan) -> Iterator[str]:
    kinds = ((Emulation, plan.emulate, "emulate"), (Link, plan.link, "link"), (Goal, plan.until, "until"))
    for kind, text, option in kinds:
        if text is not None:
            try:
                kind.parse(text, option)
            except PlanError as error:
                yield from error.problems
    yield from _unknown_names(plan)
    yield from _out_of_range(plan)
    yield from device_problems(plan.device)
    if plan.sizes is not None and plan.cuts is not None:
        yield "sizes and cuts both say where to split: give one of them."
    each: type
    for name, each, what in (("sizes", Integral, "whole numbers"), ("cuts", str, "names of layers")):
        given = getattr(plan, name)
        if given is not None and not (isinstance(given, tuple | list) and all(isinstance(one, each) for one in given)):
            yield f"{name} is {_shown(given)}: give {what}, one after the other in a tuple."
            return
    if plan.sizes is not None and len(plan.sizes) != plan.stages:
        yield f"sizes has {len(plan.sizes)} numbers for {plan.stages} stages: give one number of layers per stage."
    if plan.sizes is not None and any(size < 1 for size in plan.sizes):
        yield f"sizes {_shown(' '.join(map(str, plan.sizes)))}: every stage needs at least one layer."
    if plan.cuts is not None and len(plan.cuts) + 1 != plan.stages:
        yield f"{len(plan.cuts)} cuts for {plan.stages} stages: give the first layer of each stage but the first."
    if all(isinstance(number, Integral) for number in (plan.stages, plan.replicas)):
        yield from _without_effect(plan)


def _unknown_names(plan: Plan) -> Iterator[str]:
    for value, valid, what in (
        (plan.mode, MODES, "mode"),
        (plan.targets, TARGETS, "targets"),
        (plan.dni.form, DNI_FORMS, "DNI form"),
        (plan.optimizer.rule, OPTIMIZERS, "optimizer"),
        (plan.optimizer.schedule, SCHEDULES, "schedule"),
        (plan.balance, ("time", "layers"), "balance"),
        (plan.in_flight, ("stages", "full"), "in_flight"),
        (plan.unlock, ("always", "auto"), "unlock"),
        (plan.channels, ("auto", *CHANNELS), "channels"),
        ("bf16" if plan.channel.wire_dtype is None else plan.channel.wire_dtype, DTYPES, "wire dtype"),
        ("bf16" if plan.autocast is None else plan.autocast, DTYPES, "autocast dtype"),
    ):
        if not (isinstance(value, str) and value in valid):
            yield nearest(_shown(value), valid, what)


def _wrong_kinds(plan: Plan) -> Iterator[str]:
    """Parts whose options cannot be looked at; switches that are neither on nor off."""
    for name, kind in (("optimizer", OptimizerPlan), ("dni", DNIPlan), ("channel", ChannelPlan)):
        if not isinstance(part := getattr(plan, name), kind):
            yield f"{name} is {_shown(part)}: give a {kind.__name__}(...)."
    for field in dataclasses.fields(plan):
        if isinstance(field.default, bool) and not isinstance(value := getattr(plan, field.name), bool):
            yield f"{field.name} is {_shown(value)}: it must be True or False."
    for name in ("emulate", "link", "until"):
        if not isinstance(value := getattr(plan, name), str | None):
            yield f"{name} is {_shown(value)}: it must be a text, or None."


def _out_of_range(plan: Plan) -> Iterator[str]:
    for name, (kind, fits, says, most) in _RANGES.items():
        number = attrgetter(name)(plan)
        if number is None and attrgetter(name)(_DEFAULTS) is None:
            continue
        right = isinstance(number, kind) and _is_number(number) and fits(number)
        if not right:
            yield f"{name} is {_shown(number)}: {says}"
        elif number > most:
            whole = "a whole number, " if kind is Integral else ""
            yield f"{name} is {_shown(number)}: it must be {whole}at most {most:,}."
    counts = plan.stages, plan.replicas
    if all(isinstance(n, Integral) and 1 <= n <= _MOST_WORKERS for n in counts) and plan.workers > _MOST_WORKERS:
        yield f"{plan.replicas} replicas of {plan.stages} stages: {_MOST_WORKERS:,} workers at most."
    momentum = plan.optimizer.momentum
    if plan.optimizer.rule == "nadamw" and isinstance(momentum, Real) and momentum >= 1:
        yield f"optimizer.momentum is {_shown(momentum)}: with nadamw it must lie in [0, 1)."


def _is_number(value: object) -> bool:
    """Whether it is a finite number that a tensor can be multiplied with."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return isinstance(value, Integral)  # too large for a float: finite, and larger than any limit


def _shown(value: object) -> str:
    """The value, cut short where it is long."""
    try:
        text = str(value)
    except ValueError:  # of a whole number with thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _given(plan: Plan, *names: str) -> list[str]:
    """Which of these options are not what they are by default."""
    return [name for name in names if attrgetter(name)(plan) != attrgetter(name)(_DEFAULTS)]


def _without_effect(plan: Plan) -> Iterator[str]:
    """Nothing that is accepted is ignored."""
    mode = MODES.get(plan.mode) if isinstance(plan.mode, str) else None
    if mode is not None:
        yield from _without_effect_in(mode, plan)
    if _given(plan, "in_flight") and (plan.mode != "async-1f1b" or not plan.hop_steps):
        yield NoEffect("in_flight", "but in mode async-1f1b with hop_steps: leave it out.")
    if _given(plan, "average_every") and plan.replicas == 1:
        yield NoEffect("average_every", "without replicas: leave it out, or add replicas.")
    if plan.replicas > 1 and plan.update_probability != 1:
        yield "update_probability and replicas do not go together: replicas average after as many updates each."
    if plan.optimizer.momentum and plan.optimizer.rule not in ("sgd", "nadamw"):
        yield NoEffect("optimizer.momentum", f"with {plan.optimizer.rule}: leave it out, or choose sgd or nadamw.")
    of_cuts = _given(plan, "channel.wire_dtype", "channel.slots", "channel.gradient_slots") if plan.stages == 1 else []
    for name in (*(_given(plan, "channels") if plan.workers == 1 else []), *of_cuts):
        yield NoEffect(name, "with 1 stage, which has no channels: leave it out.")
    if plan.stages != 1 and plan.mode == "local" and plan.channel.gradient_slots is not None:
        yield NoEffect("channel.gradient_slots", "with mode local, where no gradient crosses a cut: leave it out.")
    if plan.deterministic and plan.until is not None:
        yield "until ends a run when word of it gets around, which no deterministic run repeats: leave one of them out."
    if plan.stages == 1 and plan.quality_every is not None:
        yield NoEffect("quality_every", "with 1 stage, which has no DNI: leave it out.")
    if plan.update_probability != 1 and plan.quality_every is not None:
        yield (
            "quality_every compares gradients that a stage which passes a batch over (update_probability) never has: "
            "leave one of them out."
        )
    if plan.emulate is not None:
        for name in _given(plan, "quality_every", "until"):
            yield f"{name} has no effect with emulate, where nothing is learned: leave one of them out."
        for name in _given(plan, *(["device"] if plan.device != CPU else []), "autocast", "compile"):
            yield NoEffect(name, "with emulate, where nothing is computed: leave one of them out.")
    judged = plan.quality_every or plan.unlock == "auto"
    if plan.compile and ((mode is not None and mode.stashes) or plan.targets != "bootstrap" or judged):
        yield (
            "compile and stashed weights do not go together (mode async-1f1b, targets true and mixed, quality_every, "
            "unlock auto): leave one of them out."
        )
    if plan.dni.factory is not None and plan.dni.form != "auto":
        yield f"both a DNI factory and the form {plan.dni.form} are given: leave one out."


def _without_effect_in(mode: Mode, plan: Plan) -> Iterator[str]:
    if not mode.cuts_batches and plan.microbatches != 1:
        yield NoEffect("microbatches", f"with mode {plan.mode}: leave it out, or choose mode gpipe or 1f1b.")
    if mode.averages != "weights" and plan.replicas != 1 and _given(plan, "average_every"):
        yield NoEffect("average_every", f"with mode {plan.mode}, which averages at every step: leave it out.")
    if plan.unlocked:
        yield from _locking(plan)
        if _given(plan, "mix") and plan.targets != "mixed":
            yield NoEffect("mix", f"with targets {plan.targets}: leave it out, or choose targets mixed.")
        if plan.deterministic and plan.channel.gradient_slots is not None:
            yield "deterministic runs may not drop targets: leave channel.gradient_slots out."
        return
    names = ["targets", "mix", *(["deterministic"] if plan.device in ("auto", CPU) else []), "quality_every"]
    for name in _given(plan, *names, *_LOCKING, *(["dni", "update_probability"] if mode.gradient == "true" else [])):
        if getattr(plan, name) != 0:  # a warm-up of 0 batches is none
            yield NoEffect(name, f"with mode {plan.mode}: leave it out, or choose mode unlocked.")


def _locking(plan: Plan) -> Iterator[str]:
    """What the options of ``pipeline.stage.unlock`` do not go together with."""
    given = _given(plan, *_LOCKING)
    for name in given:
        if plan.stages == 1:
            yield NoEffect(name, "with 1 stage, which has no DNI: leave it out.")
        elif plan.emulate is not None:
            yield f"{name} has no effect with emulate, where nothing is learned: leave one of them out."
    if "unlock_cosine" in given and plan.unlock != "auto" and plan.stages > 1:
        yield NoEffect("unlock_cosine", "without unlock auto: leave it out, or add unlock auto.")
    if given and plan.update_probability != 1:
        yield f"{given[0]} and update_probability do not go together: a locked stage waits for every batch's gradient."
    if plan.unlock == "auto" and plan.deterministic:
        yield (
            "unlock auto decides by what is measured, and deterministic runs fix the order of actions before: "
            "leave one of them out, or take warmup_steps."
        )
