"""How many floating-point operations a batch costs, by what they are for: counted on the stages themselves.

    plan --> the real Stage objects, fresh --> one real batch each: forward, predict, backward, step, learn
                     |  record(span)                        |  every operator, seen by FlopCounterMode
                     +------------> operations by span <----+

The spans give both the seconds of a run and the operations, so that the two columns of a ledger speak of the same work.
torch's FlopCounterMode counts products of matrices, convolutions and attention (causal as full), one multiplication and
one addition being two operations. Element by element work (activations, normalisation, loss, the optimizer) and fused
recurrent kernels are not counted; they show in the seconds.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from pipeline.data.batch import tensors_of_value
from pipeline.data.network import layers_for
from pipeline.data.recipe import Recipe
from pipeline.messages.bundle import Bundle, Item, is_differentiable
from pipeline.messages.nesting import Nesting
from pipeline.metrics.measurements import GROUPS
from pipeline.metrics.spans import Span
from pipeline.model.cut import Cut
from pipeline.model.partition import split
from pipeline.plan.plan import Plan
from pipeline.schedule.modes import MODES
from pipeline.seeding import seeded
from pipeline.stage.stage import Stage

__all__ = ["StageFlops", "count_flops"]


@dataclass(frozen=True, kw_only=True)
class StageFlops:
    """Floating-point operations of one stage for one whole training batch, in the steady state.

    Means over batches where these differ: the target of one batch in ``dni.every`` flows, and the DNI trains on it, on
    its window of rows; and stages update with ``update_probability``.
    """

    forward: float = 0.0
    backward: float = 0.0  # of the update, with the gradient of the input where one is sent down at once
    dni: float = 0.0  # prediction and training of the DNI, or of the head of a local loss
    relay: float = 0.0  # taking the true gradient through the stage after its update

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.dni + self.relay


def count_flops(recipe: Recipe, plan: Plan, cuts: Sequence[Cut]) -> tuple[StageFlops, ...]:
    """Count what every stage of a resolved plan does for a batch, by running them, one after the other, on batch 0.

    The model is built anew from the seed, and the global generator is left as it was. Takes a forward and a backward
    pass of the whole network, two with DNIs. StageError: a layer failed.
    """
    assert plan.sizes is not None, "the plan is resolved"
    assert plan.emulation is None, "a stage that sleeps computes nothing"
    batch = recipe.seeded_batch(plan.seed, 0)
    recipe = recipe.arranged(Nesting.of(batch.labels))
    x, context = map(tensors_of_value, batch)
    counted = []
    counting = dataclasses.replace(
        plan, quality_every=None, update_probability=1.0, warmup_steps=0, unlock="always", compile=False
    )
    with seeded(plan.seed, "flops"):  # stages seed the global generator for their layers
        for index, layers in enumerate(split(layers_for(recipe, plan), plan.sizes)):
            cut = cuts[index].with_loss(recipe.loss) if index < plan.stages - 1 else None
            stage = Stage(layers, index, counting, recipe, cut, cuts[index - 1] if index else None)
            spans, x = _counted(stage, counting, x, context)
            flops = {f.name: sum(spans[s] for s in GROUPS[f.name]) for f in dataclasses.fields(StageFlops)}
            p = plan.update_probability  # so many batches are updated from, and give a target
            counted.append(StageFlops(**{name: n if name == "forward" else p * n for name, n in flops.items()}))
    return tuple(counted)


def _counted(stage: Stage, plan: Plan, x: Bundle, context: Bundle) -> tuple[dict[Span, float], Bundle]:
    """What a stage does for a batch, by span, and its output.

    Batch 0 does not count: a DNI predicts zeros until its first target came, and a stage finds out about its layers.
    """
    every = plan.dni.every or 1
    weights = {every: 1 / every}
    if every > 1:
        weights[every + 1] = 1 - 1 / every  # a batch whose target does not flow
    _train(stage, plan, 0, x, context)
    spans: defaultdict[Span, float] = defaultdict(float)
    for batch, weight in weights.items():
        flops, output = _metered(stage, plan, batch, x, context)
        for span, count in flops.items():
            spans[span] += count * weight
    return spans, output


def _metered(stage: Stage, plan: Plan, batch: int, x: Bundle, context: Bundle) -> tuple[Counter[Span], Bundle]:
    """Operations of a stage by the span that has begun before them, and its output."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    counter.mod_tracker = _NoModules()
    marks, flops = [(Span.OTHER, 0)], Counter[Span]()
    stage.record = lambda span, batch: marks.append((span, counter.get_total_flops()))
    with counter:
        output = _train(stage, plan, batch, x, context)
    stage.record(Span.OTHER, batch)
    for (span, begin), (_, end) in pairwise(marks):
        flops[span] += end - begin
    return flops, output


def _train(stage: Stage, plan: Plan, batch: int, x: Bundle, context: Bundle) -> Bundle:
    """Everything a stage does with one batch; a constant stands in for the gradient that the stage above sends."""
    count = plan.microbatches
    chunks = [[[None] * count if each is None else each.chunk(count) for each in bundle] for bundle in (x, context)]
    parts = zip(*(zip(*bundle, strict=True) for bundle in chunks), strict=True)
    outputs = [stage.forward(Item(batch, part), *bundles) for part, bundles in enumerate(parts)]
    learns = stage.in_flight.of(Item(batch)).route.wants_target
    for part, h in enumerate(outputs):
        item = Item(batch, part)
        constant = tuple(torch.full_like(each, 1 / each.numel()) if is_differentiable(each) else None for each in h)
        from_above = None if stage.last else constant
        stage.backward(item, from_above if MODES[plan.mode].gradient == "true" else stage.predict(item))
    stage.step(batch)
    if stage.last:
        stage.loss_of(batch)
    elif learns and from_above is not None:
        stage.learn(Item(batch), from_above)
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*outputs, strict=True))


class _NoModules(ModuleTracker):
    """Counts are wanted by span, not by module: torch's tracker hooks a stage's input, which a relay then refuses."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: object) -> None: ...


_ATEN = torch.ops.aten
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda *gqkv, **_: sdpa_backward_flop_count(*gqkv[:4]),
}
"""The operators that FlopCounterMode of torch 2.13 leaves out: it knows the attention of GPUs only."""
