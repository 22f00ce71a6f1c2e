"""Updates at random: each stage updates from its own share of the batches, and only passes the others on.

And DNIs that do not see the labels. Both are rows of the table in Jaderberg et al. 2017.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.setup.recipe_source import GivenRecipe
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import DNIPlan, Plan, PlanError, run_reference
from pipeline.data.recipe import build_model
from pipeline.dni.dni import build_dni
from pipeline.messages.bundle import Item, present
from pipeline.model.cut import Cut
from pipeline.model.partition import layers_of, split
from pipeline.plan.check import check_plan
from pipeline.run.flops import count_flops
from pipeline.run.reference import Costs
from pipeline.run.resolve import resolve
from pipeline.schedule.policies import Action, View, scripted, unlocked
from pipeline.stage.gradient_flow import Flow
from pipeline.stage.stage import Stage
from tests import problems
from tests.cuts import cut_like
from tests.oracle import assert_same

P = 0.4


def _plan(**options: Any) -> Plan:
    return Plan(
        **{"stages": 3, "steps": 40, "update_probability": P, "balance": "layers", "dni": DNIPlan(every=1), **options}
    )


def _draws(plan: Plan) -> list[list[bool]]:
    """Stage by stage, which batches it updates from."""
    return [[Flow(plan, k).updates(batch) for batch in range(plan.steps or 0)] for k in range(plan.stages)]


def test_the_policy_skips_what_is_not_updated_from() -> None:
    assert unlocked(View(forwarded=1, updates=True)) is Action.UPDATE
    assert unlocked(View(forwarded=1, updates=False)) is Action.SKIP
    assert unlocked(View(updates=False, activation=True)) is Action.FORWARD, "nothing is open"
    assert scripted([Action.SKIP])(View()) is Action.WAIT
    assert scripted([Action.SKIP])(View(forwarded=1)) is Action.SKIP


def test_every_stage_draws_for_itself_and_always_the_same() -> None:
    plan = _plan(steps=4000, stages=2)
    first, second = _draws(plan)
    assert _draws(plan) == [first, second]
    shares = [sum(draws) / 4000 for draws in (first, second)]
    assert shares == pytest.approx([P, P], abs=0.03)
    both = sum(a and b for a, b in zip(first, second, strict=True)) / 4000
    assert both == pytest.approx(P * P, abs=0.03), "independently"
    assert _draws(_plan(steps=4000, stages=2, seed=1))[0] != first
    assert all(map(all, _draws(_plan(update_probability=1.0))))


@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
def test_stages_update_and_dnis_learn_exactly_when_drawn(targets: str) -> None:
    """A target sets out where there is an update: one stage up under bootstrap, else in the last stage."""
    plan = _plan(targets=targets, hop_steps=1.0)
    result = run_reference(problems.recipe(), plan)
    draws = _draws(plan)
    done = [dict.fromkeys(Action, 0) for _ in range(3)]
    for event in result.events:
        done[event.stage][event.action] += 1
    assert [each[Action.UPDATE] for each in done] == [sum(each) for each in draws]
    assert [each[Action.SKIP] for each in done] == [40 - sum(each) for each in draws]
    origins = draws[1:] if targets == "bootstrap" else [draws[2], draws[2]]
    assert [each[Action.LEARN] for each in done[:2]] == [sum(origin) for origin in origins]
    assert len(result.losses) == 40, "the loss of every batch is known"
    assert all(map(math.isfinite, result.losses))
    states = [stage.optimizer.state for stage in result.stages if stage.optimizer is not None]
    steps = [{float(state["step"]) for state in each.values()} for each in states]
    assert steps == [{float(sum(each))} for each in draws]


def test_a_batch_that_is_passed_over_changes_no_weight() -> None:
    plan = _plan(stages=2)
    resolved = resolve(problems.recipe(), plan)
    layers = split(layers_of(build_model(problems.recipe(), 0)), resolved.sizes)[0]
    stage = Stage(layers, 0, resolved.plan, problems.recipe(), resolved.cuts[0])
    draws = _draws(plan)[0]
    skipped, updated = (next(b for b in range(40) if draws[b] is wanted) for wanted in (False, True))
    assert stage.dni is not None
    weights = [parameter for layer in layers for parameter in layer.module.parameters()]
    for batch in (skipped, updated):
        before = [weight.detach().clone() for weight in weights]
        x, labels = problems.batch(batch)
        (h,) = stage.forward(Item(batch), (x,), (labels,))
        if batch == skipped:
            stage.skip(Item(batch))
        else:
            stage.dni.learn(present(h), labels, torch.ones_like(present(h)), batch)
            stage.backward(Item(batch), stage.predict(Item(batch)))
            stage.step(batch)
        assert all(map(torch.equal, before, weights)) is (batch == skipped)


def test_a_skip_takes_no_time_on_the_virtual_clock() -> None:
    assert Costs().of(Action.SKIP) == 0
    ends = [
        max(event.end for event in run_reference(problems.recipe(), plan).events)
        for plan in (_plan(stages=1), _plan(stages=1, update_probability=1.0))
    ]
    updates = sum(_draws(_plan(stages=1))[0])
    assert ends[1] - ends[0] == 2 * (40 - updates)


@pytest.mark.processes
@pytest.mark.parametrize("targets", ["bootstrap", "mixed"])
def test_processes_draw_what_the_reference_driver_draws(targets: str, tmp_path: Path) -> None:
    plan = _plan(stages=2, targets=targets, deterministic=True, steps=30)
    source = GivenRecipe(problems.recipe())
    result = run(source, resolve_source(source, plan), tmp_path, None, Console(quiet=True))
    truth = run_reference(problems.recipe(), plan)
    assert_same(result.state_tensors(), truth.state_tensors())
    assert result.losses == truth.losses
    assert result.measured is not None, "every batch has an end, updated from or not"


@pytest.mark.processes
@pytest.mark.parametrize("targets", ["bootstrap", "true"])
def test_emulated_stages_skip_too(targets: str, tmp_path: Path) -> None:
    source = GivenRecipe(problems.recipe())
    plan = _plan(targets=targets, steps=12, emulate="stage_ms=0.1")
    result = run(source, resolve_source(source, plan), tmp_path, None, Console(quiet=True))
    assert [record.updated for record in result.finished.values()] == [12] * 3
    learned = {stage: record.learned for stage, record in result.finished.items()}
    draws = _draws(plan)
    above = draws[1:] if targets == "bootstrap" else [draws[2]] * 2
    assert [learned[0], learned[1]] == [sum(each) for each in above]


def test_operations_are_counted_by_their_share() -> None:
    whole, part = (
        count_flops(problems.recipe(), resolved.plan, resolved.cuts)
        for resolved in (resolve(problems.recipe(), _plan(update_probability=p)) for p in (1.0, P))
    )
    assert all(one.total for one in whole)
    for one, other in zip(whole, part, strict=True):
        assert other.forward == one.forward
        assert (other.backward, other.dni) == pytest.approx((P * one.backward, P * one.dni))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            _plan(update_probability=0.0),
            "update_probability is 0.0: give the share of batches to update from, in (0, 1].",
        ),
        (
            _plan(update_probability=1.5),
            "update_probability is 1.5: give the share of batches to update from, in (0, 1].",
        ),
        (
            _plan(mode="naive", dni=DNIPlan()),
            "update_probability has no effect with mode naive: leave it out, or choose mode unlocked.",
        ),
        (
            _plan(quality_every=4),
            "quality_every compares gradients that a stage which passes a batch over (update_probability) never has: "
            "leave one of them out.",
        ),
    ],
)
def test_what_cannot_be_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert caught.value.problems == (message,)


# ---------------------------------------------------------------- without labels


@pytest.mark.parametrize("form", ["linear", "mlp", "conv"])
def test_an_unconditioned_dni_predicts_from_the_activation_alone(form: str) -> None:
    h, labels = _activation(form), torch.arange(8) % 5
    for conditioned in (True, False):
        cut = _cut(h, conditioned)
        dni = build_dni(cut, DNIPlan(form=form, labels=conditioned, hidden=4, lr=0.1), seed=0)
        for batch in range(3):
            dni.learn(h, labels, torch.sin(h) + labels.reshape(-1, *[1] * (h.dim() - 1)), batch)
        assert dni.predict(h, labels).abs().sum() > 0
        same = torch.equal(dni.predict(h, labels), dni.predict(h, labels.flip(0)))
        assert same is not conditioned


def test_an_unconditioned_linear_dni_learns_a_linear_map() -> None:
    torch.manual_seed(0)
    h, labels, true = torch.randn(8, 6), torch.zeros(8, dtype=torch.int64), torch.randn(6, 6)
    dni = build_dni(_cut(h, conditioned=False), DNIPlan(form="linear", labels=False, lr=0.02), seed=0)
    for batch in range(400):
        dni.learn(h, labels, h @ true / 100, batch)
    assert float(dni.relative_error(h, labels, h @ true / 100)) < 0.05


@pytest.mark.parametrize("form", ["label_residual", "loss_model", "auto"])
def test_forms_that_live_on_the_labels_refuse_to_do_without(form: str) -> None:
    with pytest.raises(
        PlanError, match=r"dni.labels has no effect with the DNI form \w+: leave it out, or choose linear"
    ):
        resolve(problems.recipe(), Plan(dni=DNIPlan(form=form, labels=False)))


def test_the_plan_decides_what_a_dni_sees() -> None:
    plans = [Plan(dni=DNIPlan(form="linear", labels=labels)) for labels in (True, False)]
    assert [resolve(problems.recipe(), plan).cuts[0].conditioned for plan in plans] == [True, False]


def _activation(form: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, *((2, 4, 4) if form == "conv" else (6,)), generator=generator)


def _cut(h: Tensor, conditioned: bool) -> Cut:
    return cut_like(tuple(h.shape), (8,), (8, 5), conditioned=conditioned)
