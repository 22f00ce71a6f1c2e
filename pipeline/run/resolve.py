"""From a recipe and a plan to a run that can start: everything that can be wrong is found here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from pipeline.data.batch import Minibatch, rows_of
from pipeline.data.network import tried
from pipeline.data.recipe import Recipe, build_model, check_batches
from pipeline.dni.dni import FORMS, describe_form, target_every
from pipeline.dni.loss_model import temperature_for
from pipeline.errors import NoEffect, PlanError
from pipeline.messages.bundle import TensorSpec, as_bundle, as_value, differentiable, present, specs_of
from pipeline.messages.nesting import Nesting
from pipeline.model import partition
from pipeline.model.checkpointing import check_checkpointing
from pipeline.model.cut import Cut, MainOutput
from pipeline.model.partition import Layer
from pipeline.model.proof import ties_of
from pipeline.plan.channel_choice import choose_channels
from pipeline.plan.check import check_plan
from pipeline.plan.device_choice import CPU, DeviceChoice
from pipeline.plan.goal import look_every
from pipeline.plan.plan import DNIPlan, Plan
from pipeline.run import reasons
from pipeline.run.fingerprint import fingerprint, first_two
from pipeline.run.loss_trial import Trial, check_learns, main_output, try_loss, with_loss
from pipeline.run.resolved import Resolved
from pipeline.schedule.modes import MODES
from pipeline.user_code import calling
from pipeline.wording import escaped

__all__ = ["Measure", "resolve"]

Measure = Callable[[Sequence[Layer], Sequence[Tensor]], list[float]]
"""(layers, what goes into each of them) -> seconds of forward and backward of each."""

_LABELS = ("labels", "label", "targets", "target", "y")
_QUALITY_EVERY = 20  # with unlock auto, where nobody says


def resolve(
    recipe: Recipe,
    plan: Plan,
    measure: Measure | None = None,
    hosts: Sequence[str] | None = None,
    devices: DeviceChoice | None = None,
) -> Resolved:
    """Check recipe and plan against each other and fill in what was left open. PlanError says all that cannot run.

    Runs the model on batch 0 in evaluation mode, and where it has a forward of its own, on four rows of it in training.

    Args:
        measure: measures layers when the plan asks for a balance by time; None: layers count alike.
        hosts: of every worker, those of replica 0 first; None: one host.
        devices: of every worker (``choose_devices``); None: the CPU.
    """
    check_plan(plan)
    hosts = hosts or ["this host"] * plan.workers
    devices = devices or DeviceChoice((CPU,) * plan.workers, "nothing else was looked for")
    channels = choose_channels(plan.channels, hosts, plan.replicas, devices.devices, devices.nccl)
    plan = _filled_in(recipe, plan)
    batch = check_batches(recipe, plan)
    if (rows := rows_of(batch)) % plan.microbatches:
        wish = f"{plan.microbatches} microbatches for batches of {rows} rows"
        raise PlanError(f"{wish}: give a number that divides the rows.")
    recipe = recipe.arranged(Nesting.of(batch.labels))
    inputs, labels = map(as_value, batch.tensors())
    layers, outputs, how, because = tried(build_model(recipe, plan.seed), batch.inputs, plan)
    if plan.compile and how == "forward":
        raise PlanError("compile needs a chain of layers, and here every stage runs a part of the model's forward.")
    plan = dataclasses.replace(plan, split=how)
    _check_names(layers)
    sizes = partition.chosen_sizes(layers, plan)
    seconds: tuple[float, ...] | None = None
    why = "given" if plan.sizes or plan.cuts else "number of layers"
    if sizes is None:
        if measure is not None and plan.stages > 1:
            seconds = tuple(measure(layers, [inputs, *outputs[:-1]]))
            why = "measured time per layer"
        sizes = partition.balanced_split(layers, seconds or [1.0] * len(layers), plan.stages)
    stages = partition.split(layers, sizes)
    if (ties := ties_of(stages)) is not None and plan.replicas > 1:
        names = " and ".join(ties.names[0])
        raise PlanError(
            f"{names} are the same tensor, in several stages: choose replicas 1, or put both into one stage."
        )
    if ties is not None and plan.deterministic:
        raise PlanError("deterministic is not there where stages share weights: leave it out, or untie them.")
    plan = dataclasses.replace(plan, ties=ties)
    check_checkpointing(stages, plan, inputs)
    check_learns(layers, inputs, outputs)
    outlet, output, loss = main_output(recipe.loss, outputs[-1], labels, plan)
    trial = try_loss(loss, output, labels, without_labels=batch.labels is batch.inputs)
    ends = list(accumulate(sizes[:-1]))
    cuts, about_loss = with_loss(tuple(_cuts(stages, outputs, labels, output, recipe, plan, outlet)), plan, trial)
    if problems := list(_unread_options(plan, cuts)):
        raise PlanError(*problems)
    says = (
        ("mode", plan.mode, MODES[plan.mode].says),
        ("split", " | ".join(map(str, sizes)), why + partition.places_of_cuts(stages)),
        *((("forward", "the model's own", f"every stage runs a part of it: {because}"),) if how == "forward" else ()),
        *partition.evaluated_in_training(layers),
        ("device", devices.says, devices.why),
        *(reasons.of_rounding(layers, ends, outputs) if MODES[plan.mode].exact else ()),
        *reasons.of_ties(plan),
        *reasons.as_planned(plan),
        *reasons.of_dnis(plan, cuts),
        *reasons.of_updates(plan, about_loss),
    )
    dni = dataclasses.replace(plan.dni, every=target_every(cuts, plan.dni)) if plan.unlocked else plan.dni
    resolved = Resolved(
        plan=dataclasses.replace(plan, sizes=sizes, cuts=None, dni=dni),
        layer_names=tuple(layer.name for layer in layers),
        layer_parameters=tuple(sum(p.numel() for p in layer.module.parameters()) for layer in layers),
        layer_bytes=tuple(sum(t.nbytes + 1 for t in layer.module.state_dict().values()) for layer in layers),
        layer_seconds=seconds,
        cuts=cuts,
        batch_shape=tuple(present(batch.tensors()[0][0]).shape),
        output_shape=tuple(output.shape),
        held_out_batches=_count_held_out(recipe, batch, trial),
        channels=channels,
        hosts=tuple(hosts),
        devices=devices.devices,
        nccl=devices.nccl,
        reasons=says,
        two_labels=first_two(labels) if isinstance(labels, Tensor) else b"",
        structured=outlet is not None,
        labels=Nesting.of(batch.labels),
    )
    built = tuple(fingerprint(recipe, resolved, index, stage) for index, stage in enumerate(stages))
    return dataclasses.replace(resolved, fingerprints=built)


def _filled_in(recipe: Recipe, plan: Plan) -> Plan:
    """The plan with its length, and where they are needed the batches between two looks and two samples."""
    for option, given in {"evaluate_every": plan.evaluate_every, "until": plan.until}.items():
        if given is not None and recipe.evaluation is None:
            raise PlanError(f"{option} has no effect without held-out batches: leave it out, or give evaluation.")
    steps, every = plan.steps or recipe.steps, plan.evaluate_every
    if plan.goal is not None:
        if plan.goal.metric == "accuracy" and recipe.correct is None:
            raise PlanError(f"until {plan.goal}: the recipe counts no right answers; give correct, or ask for a loss.")
        every = every or look_every(steps)
    samples = plan.quality_every or (_QUALITY_EVERY if plan.unlock == "auto" else None)
    return dataclasses.replace(plan, steps=steps, evaluate_every=every, quality_every=samples)


def _cuts(
    stages: Sequence[Sequence[Layer]],
    outputs: Sequence[Any],
    labels: Any,
    output: Tensor,
    recipe: Recipe,
    plan: Plan,
    outlet: MainOutput | None,
) -> Iterator[Cut]:
    """What crosses each cut has a gradient, else PlanError; and one tensor of it, where something predicts that."""
    below: list[Layer] = []
    for index, stage in enumerate(stages[:-1]):
        below += stage
        name, bundle, context = below[-1].name, as_bundle(outputs[len(below) - 1]), as_bundle(labels)
        count = len(differentiable(bundle))
        if not count:
            dtypes = ", ".join(str(tensor.dtype) for tensor in bundle if tensor is not None)
            raise PlanError(
                f"layer {name} gives {dtypes}, and no gradient can cross a cut behind it: cut elsewhere (--sizes or "
                "--cuts)."
            )
        if count > 1 and MODES[plan.mode].gradient != "true":
            raise PlanError(
                f"layer {name} gives {count} tensors of floating-point numbers, and in mode {plan.mode} one crosses a "
                "cut: cut elsewhere (--sizes or --cuts), make a mask one of whole numbers, or choose mode naive, "
                "gpipe, 1f1b or async-1f1b."
            )
        yield Cut(
            index=index,
            specs=specs_of(bundle, "activation", differentiable=True),
            context=specs_of(context, "labels"),
            label=_label_of(recipe.labels, len(context)),
            outlet=outlet,
            output=TensorSpec("output", tuple(output.shape), output.dtype, differentiable=True),
            loss=recipe.loss if outlet is None else outlet.loss(recipe.loss),
            normalised=partition.ends_normalised(below),
            depth=partition.depth_of(stage),
            uppermost=index == plan.stages - 2,
            conditioned=plan.dni.labels,
        )


def _label_of(layout: Nesting | None, count: int) -> int:
    """Which of the tensors of the context are the labels: those that are called so, or else the first."""
    names = list(layout.structure.context or ()) if layout is not None and layout.structure.type is dict else []
    called = [names.index(name) for name in _LABELS if name in names and len(names) == count]
    return called[0] if called else 0


def _unread_options(plan: Plan, cuts: Sequence[Cut]) -> Iterator[str]:
    """Options of the DNI that are given and that nothing in this run reads."""
    given = {f.name for f in dataclasses.fields(DNIPlan) if getattr(plan.dni, f.name) != getattr(DNIPlan(), f.name)}
    if cuts and MODES[plan.mode].gradient == "local":
        for name in sorted(given - {"hidden", "lr"}):
            yield NoEffect(f"dni.{name}", f"with mode {plan.mode}: leave it out, or choose mode unlocked.")
    if not (cuts and plan.unlocked):
        return
    forms = {describe_form(cut, plan.dni)[0] for cut in cuts}
    for name in sorted(given & {option for form in FORMS.values() for option in form.reads}):
        readers = [reader for reader, form in FORMS.items() if name in form.reads]
        if not forms & set(readers):
            remedy = f"leave it out, or choose {' or '.join(readers)}."
            yield NoEffect(f"dni.{name}", f"with the DNI form {' and '.join(sorted(forms))}: {remedy}")
    highest = max(temperature_for(cut, plan.dni.temperature) for cut in cuts)
    if forms == {"loss_model"} and highest < (plan.dni.temperature or 1):
        why = "with this loss: it softens torch's cross-entropy of one class per row; leave it out."
        yield NoEffect("dni.temperature", why)


def _check_names(layers: Sequence[Layer]) -> None:
    """The weights are saved under these names in the end."""
    names = [name for layer in layers for name in (layer.name, *layer.module.state_dict())]
    if wrong := next((name for name in names if escaped(name) != name), None):
        raise PlanError(f"a layer, or a parameter of one, is called {wrong!r}, which no file can hold: rename it.")


def _count_held_out(recipe: Recipe, first: Minibatch, trial: Trial) -> int:
    """Held-out batches, each like batch 0, or smaller."""
    if recipe.evaluation is None:
        return 0
    with calling("evaluation()"):
        count, sizes = 0, {rows_of(first)}
        for count, batch in enumerate(recipe.held_out(), start=1):
            _check_held_out(count - 1, batch, first)
            if (rows := rows_of(batch)) not in sizes and (error := trial.error(rows)) is not None:
                raise PlanError(
                    f"evaluation batch {count - 1} has {rows} rows, which the loss does not take ({error}): leave it "
                    "out, or take a loss of any number of rows."
                ) from error
            sizes.add(rows)
    if not count:
        raise PlanError("evaluation() gives no batch: give held-out batches (inputs, labels), or leave evaluation out.")
    return count


def _check_held_out(index: int, batch: Minibatch, first: Minibatch) -> None:
    (inputs, labels), (x, y) = (each.tensors() for each in (batch, first))
    pairs = [(present(one), present(like)) for one, like in zip(inputs, x, strict=False)]
    fits = len(inputs) == len(x) and all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in pairs)
    fits = (
        fits
        and len(labels) == len(y)
        and all(present(a).nbytes <= present(b).nbytes for a, b in zip(labels, y, strict=True))
    )
    rows, most = ([len(present(each)) for each in value] for value in ((*inputs, *labels), x))
    if not fits or not 0 < rows[0] <= most[0] or rows.count(rows[0]) != len(rows):
        mine, theirs = (
            [", ".join(f"{list(present(each).shape)} {present(each).dtype}" for each in part) for part in parts]
            for parts in ((inputs, labels), (x, y))
        )
        raise PlanError(
            f"evaluation batch {index} has inputs {mine[0]} and labels {mine[1]}: it needs 1 to {most[0]} rows, the "
            f"inputs as in training, {theirs[0]}, the labels no larger, {theirs[1]}."
        )
