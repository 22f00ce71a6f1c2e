"""From a recipe and a plan to a run that can start: everything that can be wrong is found here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from pipeline.data.recipe import Recipe, build_model, check_batches
from pipeline.dni.dni import FORMS, describe_form, target_every
from pipeline.dni.loss_model import temperature_for
from pipeline.errors import NoEffect, PlanError
from pipeline.messages.bundle import TensorSpec, as_bundle, differentiable, specs_of
from pipeline.model import partition
from pipeline.model.checkpointing import check_checkpointing
from pipeline.model.cut import Cut
from pipeline.model.partition import Layer
from pipeline.model.proof import check_chain, check_ties
from pipeline.plan.channel_choice import choose_channels
from pipeline.plan.check import check_plan
from pipeline.plan.device_choice import CPU, DeviceChoice
from pipeline.plan.goal import look_every
from pipeline.plan.plan import DNIPlan, Plan
from pipeline.run import reasons
from pipeline.run.fingerprint import fingerprint, first_two
from pipeline.run.loss_trial import Trial, check_learns, try_loss, with_loss
from pipeline.run.resolved import Resolved
from pipeline.schedule.modes import MODES
from pipeline.user_code import calling
from pipeline.wording import escaped

__all__ = ["Measure", "resolve", "stage_layers"]

Measure = Callable[[Sequence[Layer], Sequence[Tensor]], list[float]]
"""(layers, what goes into each of them) -> seconds of forward and backward of each."""

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
    inputs, labels = check_batches(recipe, plan)
    if (rows := len(inputs)) % plan.microbatches:
        wish = f"{plan.microbatches} microbatches for batches of {rows} rows"
        raise PlanError(f"{wish}: give a number that divides the rows.")
    model = build_model(recipe, plan.seed)
    layers = partition.layers_of(model)
    _check_names(layers)
    sizes = partition.chosen_sizes(layers, plan)
    outputs = check_chain(model, layers, inputs)
    seconds: tuple[float, ...] | None = None
    why = "given" if plan.sizes or plan.cuts else "number of layers"
    if sizes is None:
        if measure is not None and plan.stages > 1 and all(isinstance(output, Tensor) for output in outputs):
            seconds = tuple(measure(layers, [inputs, *outputs[:-1]]))
            why = "measured time per layer"
        sizes = partition.balanced_split(layers, seconds or [1.0] * len(layers), plan.stages)
    stages = partition.split(layers, sizes)
    check_ties(stages)
    check_checkpointing(stages, plan, inputs)
    check_learns(layers, inputs, outputs)
    trial = try_loss(recipe.loss, outputs[-1], labels)
    ends = list(accumulate(sizes[:-1]))
    cuts, about_loss = with_loss(tuple(_cuts(stages, outputs, labels, recipe, plan)), plan, trial)
    if problems := list(_unread_options(plan, cuts)):
        raise PlanError(*problems)
    says = (
        ("mode", plan.mode, MODES[plan.mode].says),
        ("split", " | ".join(map(str, sizes)), why + partition.places_of_cuts(stages)),
        *partition.evaluated_in_training(layers),
        ("device", devices.says, devices.why),
        *(reasons.of_rounding(layers, ends, outputs) if MODES[plan.mode].exact else ()),
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
        batch_shape=tuple(inputs.shape),
        output_shape=tuple(outputs[-1].shape),
        held_out_batches=_count_held_out(recipe, inputs, trial),
        channels=channels,
        hosts=tuple(hosts),
        devices=devices.devices,
        nccl=devices.nccl,
        reasons=says,
        two_labels=first_two(labels),
    )
    built = tuple(fingerprint(recipe, resolved, index, stage) for index, stage in enumerate(stages))
    return dataclasses.replace(resolved, fingerprints=built)


def stage_layers(recipe: Recipe, plan: Plan, index: int) -> list[Layer]:
    """The layers of one stage, freshly initialised from the seed; the rest of the model is dropped."""
    assert plan.sizes is not None, "the plan is resolved"
    return partition.split(partition.layers_of(build_model(recipe, plan.seed)), plan.sizes)[index]


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
    stages: Sequence[Sequence[Layer]], outputs: Sequence[Any], labels: Tensor, recipe: Recipe, plan: Plan
) -> Iterator[Cut]:
    """What crosses each cut has a gradient, else PlanError; and one tensor of it, where something predicts that."""
    below: list[Layer] = []
    for index, stage in enumerate(stages[:-1]):
        below += stage
        name, bundle = below[-1].name, as_bundle(outputs[len(below) - 1])
        count = len(differentiable(bundle))
        if not count:
            dtypes = ", ".join(str(tensor.dtype) for tensor in bundle if tensor is not None)
            raise PlanError(
                f"layer {name} gives {dtypes}, and no gradient can cross a cut behind it: cut elsewhere (--sizes or "
                "--cuts)."
            )
        if count > 1 and MODES[plan.mode].gradient != "true":
            raise PlanError(
                f"layer {name} gives {count} tensors that gradients come back for, and in mode {plan.mode} a cut has "
                "one: cut elsewhere (--sizes or --cuts), or choose mode naive, gpipe, 1f1b or async-1f1b."
            )
        yield Cut(
            index=index,
            specs=specs_of(bundle, "activation", differentiable=True),
            context=specs_of((labels,), "labels"),
            output=TensorSpec("output", tuple(outputs[-1].shape), outputs[-1].dtype, differentiable=True),
            loss=recipe.loss,
            normalised=partition.ends_normalised(below),
            depth=partition.depth_of(stage),
            uppermost=index == plan.stages - 2,
            conditioned=plan.dni.labels,
        )


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


def _count_held_out(recipe: Recipe, x: Tensor, trial: Trial) -> int:
    """Held-out batches, each like batch 0, or smaller. ``x`` are the inputs of batch 0."""
    if recipe.evaluation is None:
        return 0
    y = trial.labels
    with calling("evaluation()"):
        count, sizes = 0, {len(y)}
        for count, (inputs, labels) in enumerate(recipe.held_out(), start=1):
            fits = inputs.shape[1:] == x.shape[1:] and inputs.dtype == x.dtype and labels.nbytes <= y.nbytes
            if not fits or len(inputs) != len(labels) or not 0 < len(inputs) <= len(x):
                raise PlanError(
                    f"evaluation batch {count - 1} has inputs {list(inputs.shape)} {inputs.dtype} and labels "
                    f"{list(labels.shape)} {labels.dtype}: it needs 1 to {len(x)} rows, the inputs {x.dtype} of shape "
                    f"{list(x.shape[1:])}, the labels no larger than in training, {list(y.shape)} {y.dtype}."
                )
            if (rows := len(labels)) not in sizes and (error := trial.error(rows)) is not None:
                raise PlanError(
                    f"evaluation batch {count - 1} has {rows} rows, which the loss does not take ({error}): leave it "
                    "out, or take a loss of any number of rows."
                ) from error
            sizes.add(rows)
    if not count:
        raise PlanError("evaluation() gives no batch: give held-out batches (inputs, labels), or leave evaluation out.")
    return count
