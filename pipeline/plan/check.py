"""What is wrong with a plan: one sentence per mistake, all of them at once, before anything starts.

unknown names -> numbers out of range -> what contradicts itself -> what would have no effect
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral, Real

from pipeline.errors import NoEffect, PlanError, nearest
from pipeline.plan.channel_choice import CHANNELS, WIRE_DTYPES
from pipeline.plan.device_choice import AUTOCAST_DTYPES, CPU, device_problems
from pipeline.plan.emulation import Emulation, Link
from pipeline.plan.goal import Goal
from pipeline.plan.names import DNI_FORMS, OPTIMIZERS, SCHEDULES, TARGETS
from pipeline.plan.plan import Plan
from pipeline.schedule.modes import MODES

__all__ = ["check_plan"]

_LOCKING = ("warmup_steps", "unlock", "unlock_cosine")


def check_plan(plan: Plan) -> Plan:
    """Return ``plan`` if it can run.

    Raises:
        PlanError: with one sentence per mistake, which says what to do.
    """
    if problems := list(_problems(plan)):
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
    if plan.sizes is not None and len(plan.sizes) != plan.stages:
        yield f"sizes has {len(plan.sizes)} numbers for {plan.stages} stages: give one number of layers per stage."
    if plan.sizes is not None and any(size < 1 for size in plan.sizes):
        yield f"sizes {_spaced(plan.sizes)}: every stage needs at least one layer."
    if plan.cuts is not None and len(plan.cuts) + 1 != plan.stages:
        yield f"{len(plan.cuts)} cuts for {plan.stages} stages: give the first layer of each stage but the first."
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
        (plan.channel.wire_dtype or "bf16", tuple(WIRE_DTYPES), "wire dtype"),
        (plan.autocast or "bf16", AUTOCAST_DTYPES, "autocast dtype"),
    ):
        if value not in valid:
            yield nearest(str(value), valid, what)


def _out_of_range(plan: Plan) -> Iterator[str]:
    for name, value, least in (
        ("stages", plan.stages, 1),
        ("replicas", plan.replicas, 1),
        ("average_every", plan.average_every, 1),
        ("microbatches", plan.microbatches, 1),
        ("steps", plan.steps, 1),
        ("evaluate_every", plan.evaluate_every, 1),
        ("quality_every", plan.quality_every, 1),
        ("threads", plan.threads, 1),
        ("dni.hidden", plan.dni.hidden, 1),
        ("dni.every", plan.dni.every, 1),
        ("channel.slots", plan.channel.slots, 1),
        ("channel.gradient_slots", plan.channel.gradient_slots, 1),
        ("warmup_steps", plan.warmup_steps, 0),
        ("optimizer.warmup_steps", plan.optimizer.warmup_steps, 0),
        ("seed", plan.seed, 0),
    ):
        if value is not None and not (isinstance(value, Integral) and value >= least):
            yield f"{name} is {value}: it must be a whole number, at least {least}."
    for name, number in (
        ("hop_steps", plan.hop_steps),
        ("optimizer.momentum", plan.optimizer.momentum or 0),
        ("optimizer.weight_decay", plan.optimizer.weight_decay),
    ):
        if not (_is_number(number) and number >= 0):
            yield f"{name} is {number}: it must be a number, at least 0."
    for name, number in (
        ("optimizer.lr", plan.optimizer.lr),
        ("dni.lr", plan.dni.lr),
        ("stall_after_s", plan.stall_after_s),
    ):
        if not (_is_number(number) and number > 0):
            yield f"{name} is {number}: it must be a positive number."
    momentum = plan.optimizer.momentum
    if plan.optimizer.rule == "nadamw" and isinstance(momentum, Real) and momentum >= 1:
        yield f"optimizer.momentum is {momentum}: with nadamw it must lie in [0, 1)."
    if plan.optimizer.clip is not None and not (_is_number(plan.optimizer.clip) and plan.optimizer.clip > 0):
        yield f"optimizer.clip is {plan.optimizer.clip}: it must be a positive number, or None."
    temperature = plan.dni.temperature
    if temperature is not None and not (_is_number(temperature) and 1 <= temperature < math.inf):
        yield f"dni.temperature is {temperature}: give a number of at least 1."
    if not (_is_number(plan.dni.rows) and 0 < plan.dni.rows <= 1):
        yield f"dni.rows is {plan.dni.rows}: give the fraction of the rows to train on, in (0, 1]."
    if not (_is_number(plan.update_probability) and 0 < plan.update_probability <= 1):
        yield f"update_probability is {plan.update_probability}: give the share of batches to update from, in (0, 1]."
    if not (_is_number(plan.unlock_cosine) and 0 < plan.unlock_cosine <= 1):
        yield f"unlock_cosine is {plan.unlock_cosine}: it must lie in (0, 1]."
    if not (_is_number(plan.mix) and 0 <= plan.mix <= 1):
        yield f"mix is {plan.mix}: it weighs the true gradient and must lie in [0, 1]."


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _without_effect(plan: Plan) -> Iterator[str]:
    """Nothing that is accepted is ignored."""
    defaults = Plan()
    mode = MODES.get(plan.mode)
    if mode is not None and not mode.cuts_batches and plan.microbatches != 1:
        yield NoEffect("microbatches", f"with mode {plan.mode}: leave it out, or choose mode gpipe or 1f1b.")
    if plan.in_flight != defaults.in_flight and (plan.mode != "async-1f1b" or not plan.hop_steps):
        yield NoEffect("in_flight", "but in mode async-1f1b with hop_steps: leave it out.")
    if plan.average_every != defaults.average_every and plan.replicas == 1:
        yield NoEffect("average_every", "without replicas: leave it out, or add replicas.")
    elif mode is not None and mode.averages != "weights" and plan.average_every != defaults.average_every:
        yield NoEffect("average_every", f"with mode {plan.mode}, which averages at every step: leave it out.")
    if plan.replicas > 1 and plan.update_probability != 1.0:
        yield "update_probability and replicas do not go together: replicas average after as many updates each."
    if mode is not None and mode.gradient != "synthetic":
        for name in (
            "targets",
            "mix",
            *(["deterministic"] if plan.device in ("auto", CPU) else []),
            "quality_every",
            *_LOCKING,
            *(["dni", "update_probability"] if mode.gradient == "true" else []),
        ):
            if getattr(plan, name) not in (getattr(defaults, name), 0):  # a warm-up of 0 batches is none
                yield NoEffect(name, f"with mode {plan.mode}: leave it out, or choose mode unlocked.")
    if mode is not None and plan.unlocked:
        yield from _locking(plan, defaults)
    if mode is not None and plan.unlocked and plan.mix != defaults.mix and plan.targets != "mixed":
        yield NoEffect("mix", f"with targets {plan.targets}: leave it out, or choose targets mixed.")
    if plan.optimizer.momentum and plan.optimizer.rule not in ("sgd", "nadamw"):
        yield NoEffect("optimizer.momentum", f"with {plan.optimizer.rule}: leave it out, or choose sgd or nadamw.")
    if plan.workers == 1 and plan.channels != defaults.channels:
        yield NoEffect("channels", "with 1 stage, which has no channels: leave it out.")
    for name in ("wire_dtype", "slots", "gradient_slots"):
        if plan.stages == 1 and getattr(plan.channel, name) != getattr(defaults.channel, name):
            yield NoEffect(f"channel.{name}", "with 1 stage, which has no channels: leave it out.")
    if plan.stages != 1 and plan.mode == "local" and plan.channel.gradient_slots is not None:
        yield NoEffect("channel.gradient_slots", "with mode local, where no gradient crosses a cut: leave it out.")
    if plan.deterministic and mode is not None and plan.unlocked and plan.channel.gradient_slots is not None:
        yield "deterministic runs may not drop targets: leave channel.gradient_slots out."
    if plan.deterministic and plan.until is not None:
        yield "until ends a run when word of it gets around, which no deterministic run repeats: leave one of them out."
    if plan.stages == 1 and plan.quality_every is not None:
        yield NoEffect("quality_every", "with 1 stage, which has no DNI: leave it out.")
    if plan.update_probability != 1 and plan.quality_every is not None:
        yield (
            "quality_every compares gradients that a stage which passes a batch over (update_probability) never has: "
            "leave one of them out."
        )
    if plan.emulate is not None and plan.quality_every is not None:
        yield "quality_every has no effect with emulate, where nothing is learned: leave one of them out."
    for name in ("device", "autocast", "compile"):
        if plan.emulate is not None and getattr(plan, name) not in (getattr(defaults, name), CPU):
            yield NoEffect(name, "with emulate, where nothing is computed: leave one of them out.")
    judged = plan.quality_every or plan.unlock == "auto"
    if plan.compile and ((mode is not None and mode.stashes) or plan.targets != "bootstrap" or judged):
        yield (
            "compile and stashed weights do not go together (mode async-1f1b, targets true and mixed, quality_every, "
            "unlock auto): leave one of them out."
        )
    if plan.emulate is not None and plan.until is not None:
        yield "until has no effect with emulate, where nothing is learned: leave one of them out."
    if plan.dni.factory is not None and plan.dni.form != "auto":
        yield f"both a DNI factory and the form {plan.dni.form} are given: leave one out."


def _locking(plan: Plan, defaults: Plan) -> Iterator[str]:
    """What the options of ``pipeline.stage.unlock`` do not go together with."""
    given = [name for name in _LOCKING if getattr(plan, name) != getattr(defaults, name)]
    for name in given:
        if plan.stages == 1:
            yield NoEffect(name, "with 1 stage, which has no DNI: leave it out.")
        elif plan.emulate is not None:
            yield f"{name} has no effect with emulate, where nothing is learned: leave one of them out."
    if plan.unlock_cosine != defaults.unlock_cosine and plan.unlock != "auto" and plan.stages > 1:
        yield NoEffect("unlock_cosine", "without unlock auto: leave it out, or add unlock auto.")
    if given and plan.update_probability != 1:
        yield f"{given[0]} and update_probability do not go together: a locked stage waits for every batch's gradient."
    if plan.unlock == "auto" and plan.deterministic:
        yield (
            "unlock auto decides by what is measured, and deterministic runs fix the order of actions before: "
            "leave one of them out, or take warmup_steps."
        )


def _spaced(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))
