"""What the first screen says of a run: (what was decided, value, why), line by line, from what was decided."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.dni.dni import describe_form
from pipeline.dni.loss_model import temperature_for
from pipeline.messages.bundle import as_bundle
from pipeline.messages.message import dense
from pipeline.model.cut import Cut
from pipeline.model.partition import Layer
from pipeline.plan.plan import Plan
from pipeline.schedule.modes import MODES

__all__ = ["Reason", "as_planned", "of_dnis", "of_rounding", "of_updates"]

Reason = tuple[str, str, str]
_AVERAGES = {
    "gradients": "gradients are averaged before every step: as one process on the {0.replicas} batches of a step",
    "weights": "weights are averaged every {0.average_every} steps, nobody waits for it, and at the end",
}
_AS_PLANNED: tuple[tuple[str, Callable[[Plan], str | None], str], ...] = (
    ("autocast", lambda p: p.autocast, "layers compute in it where torch.autocast does; weights are float32"),
    ("emulate", lambda p: p.emulate, "every stage sleeps so long instead of computing; nothing is learned"),
    ("link", lambda p: p.link, "every message is made late, as on such a link"),
    ("compile", lambda p: "yes" if p.compile else None, "every stage by torch.compile, at its first batch"),
)


def as_planned(plan: Plan) -> Iterator[Reason]:
    """Of what is as the plan gives it."""
    return ((what, value, why) for what, value_of, why in _AS_PLANNED if (value := value_of(plan)) is not None)


def of_ties(plan: Plan) -> Iterator[Reason]:
    """Of weights that several stages have."""
    if plan.ties is not None:
        sums = "the gradients of all copies are added up before every step: exact"
        means = f"the copies are averaged every {plan.average_every} steps, nobody waits for it, and at the end"
        names = ", ".join(" = ".join(each) for each in plan.ties.names)
        where = " and ".join(map(str, plan.ties.stages))
        how = sums if MODES[plan.mode].averages == "gradients" else means
        yield "tied", names, f"in stages {where}; {how}"


def of_rounding(layers: Sequence[Layer], ends: Sequence[int], outputs: Sequence[Any]) -> Iterator[Reason]:
    """Of cuts behind which a locked stage computes on other strides than one process does."""
    for k, end in enumerate(ends):
        if any(dense(t).stride() != t.stride() for t in as_bundle(outputs[end - 1]) if t is not None):
            what = f"layer {layers[end - 1].name} gives a slice or an expanded tensor, which travels dense"
            yield f"cut {k}", "but for rounding", f"{what}: equal to one process up to the last bits"


def of_dnis(plan: Plan, cuts: Sequence[Cut]) -> Iterator[Reason]:
    """Of the DNIs: their form, and the temperature of a loss model's predictions where it is not 1."""
    if not (plan.unlocked and cuts):
        return
    form, why = describe_form(cuts[0], plan.dni)
    yield "DNI", form, why
    softened = [temperature_for(cut, plan.dni.temperature) for cut in cuts] if form == "loss_model" else [1.0]
    if max(softened) > 1:
        where = "all cuts" if plan.dni.temperature else "the uppermost cut"
        yield "softened", f"by {max(softened):g}", f"the DNI's temperature at {where}: a softer loss teaches sooner"


def of_updates(plan: Plan, about_loss: Sequence[Reason]) -> Iterator[Reason]:
    """Of replicas, of the end of the run, of what travels, of the loss, and of what is locked at first."""
    if plan.replicas > 1:
        yield "replicas", str(plan.replicas), _AVERAGES[MODES[plan.mode].averages].format(plan)
    if plan.until is not None:
        every = "batch" if plan.evaluate_every == 1 else f"{plan.evaluate_every:,} batches"
        yield "until", str(plan.goal), f"held-out data, looked at every {every}; {plan.steps:,} batches at most"
    if plan.channel.wire_dtype is not None:
        yield "wire", plan.channel.wire_dtype, "float32 is rounded on its way: half the bytes, not exact"
    yield from about_loss
    if plan.warmup_steps:
        yield "warm-up", f"{plan.warmup_steps:,} batches", "locked, while the DNIs learn; nothing is updated from them"
    if plan.unlock == "auto":
        least, looks = plan.unlock_cosine, f"every {plan.quality_every}th batch is looked at"
        when = f"a stage unlocks at cosine {least:g} between its gradients, locks again below {least / 3:.2g}"
        yield "unlock", "auto", f"{when}; {looks}"
