"""Synthetic gradients are compared with the true gradient of the same forward pass, and training does not notice."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch import train
from launch.results.dni_quality import summarised
from pipeline import DNIPlan, OptimizerPlan, Plan, PlanError, Recipe
from pipeline.data.network import stage_layers
from pipeline.messages.bundle import Item
from pipeline.plan.check import check_plan
from pipeline.run.reference import run_reference
from pipeline.run.resolve import resolve
from pipeline.stage.dni_quality import compare
from pipeline.stage.stage import Stage
from tests import problems
from workers.telemetry.records import Judged

ROWS = 24


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 12), nn.Dropout(0.2), nn.Tanh(), nn.Linear(12, 4)
    )


def batches(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(ROWS, 8, generator=generator)
    return x, x[:, :4].argmax(1)


RECIPE = Recipe(name="small", model=model, batches=batches, loss=F.cross_entropy, steps=12)
PLAN = Plan(stages=3, sizes=(3, 3, 1), dni=DNIPlan(rows=0.5, every=1), seed=5)


def test_compare_by_hand() -> None:
    s, g = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    found = compare(7, s, g, [torch.tensor([3.0]), None], [torch.tensor([4.0]), torch.tensor([3.0])])
    assert (found.batch, found.cosine, found.norm_ratio) == (7, pytest.approx(0.8), pytest.approx(0.6))
    assert found.error == pytest.approx(0.5)


def test_a_gradient_of_zeros_has_no_direction() -> None:
    zero = torch.zeros(2)
    found = compare(0, zero, torch.ones(2), [zero], [torch.ones(2)])
    assert (found.cosine, found.norm_ratio, found.error) == (0.0, 0.0, pytest.approx(1.0))


def test_both_gradients_are_those_of_the_weights_of_the_forward_pass() -> None:
    """Two stages by hand: the true gradient comes only after two more updates, and is judged on the old weights."""
    resolved = resolve(RECIPE, replace(PLAN, stages=2, sizes=(3, 4), quality_every=3))
    plan = resolved.plan
    below = Stage(stage_layers(RECIPE, plan, 0), 0, plan, RECIPE, replace(resolved.cuts[0], loss=RECIPE.loss))
    above = Stage(stage_layers(RECIPE, plan, 1), 1, plan, RECIPE, None, resolved.cuts[0])
    true: Tensor | None = None
    for batch in range(5):
        item, (x, labels) = Item(batch), batches(batch)
        if batch == 2:
            alone = copy.deepcopy(nn.Sequential(*(layer.module for layer in below.layers))).train()
        (h,) = below.forward(item, (x,), (labels,))
        predicted = below.predict(item)
        assert h is not None
        assert predicted is not None
        assert predicted[0] is not None
        if batch == 2:
            synthetic = predicted[0].clone()
        below.backward(item, predicted)
        below.step(batch)
        above.forward(item, (h.clone(),), (labels,))
        target = above.backward(item, None)
        assert target is not None
        sample = above.true_gradient()
        assert (sample is not None) == (batch == 2)
        true = sample[0] if sample is not None else true
        below.learn(item, target)
    assert true is not None
    quality, relayed = below.judge(2, (true,))
    assert relayed is None
    h = alone(batches(2)[0])
    under = [torch.autograd.grad(h, list(alone.parameters()), each, retain_graph=True) for each in (synthetic, true)]
    flat_s, flat_g = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in under)
    assert quality.cosine == pytest.approx(float(F.cosine_similarity(flat_s, flat_g, dim=0)), rel=1e-4)
    assert quality.norm_ratio == pytest.approx(float(flat_s.norm() / flat_g.norm()), rel=1e-4)
    error = (synthetic - true).square().sum() / true.square().sum()
    assert quality.error == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
@pytest.mark.parametrize("hop", [0.0, 1.0])
def test_training_is_the_same_with_samples_and_without(targets: str, hop: float) -> None:
    """To the last bit where DNIs train on all rows."""
    plan = replace(PLAN, targets=targets, hop_steps=hop, dni=DNIPlan(every=1))
    without, sampled = run_reference(RECIPE, plan), run_reference(RECIPE, replace(plan, quality_every=2))
    assert sampled.losses == without.losses
    assert all(torch.equal(value, without.state_tensors()[name]) for name, value in sampled.state_tensors().items())
    assert [[quality.batch for quality in sampled.qualities[k]] for k in (0, 1)] == [[1, 3, 5, 7, 9, 11]] * 2
    assert not without.qualities[0]


def test_training_is_the_same_with_samples_up_to_rounding_where_dnis_train_on_half_the_rows() -> None:
    """Not to the last bit, which was asked once: a sampled batch needs the input gradient of all its rows, and products
    of all rows and of half of them may sum in different orders."""
    plan = replace(PLAN, optimizer=OptimizerPlan(rule="sgd", lr=0.1))
    without, sampled = run_reference(RECIPE, plan), run_reference(RECIPE, replace(plan, quality_every=2))
    assert sampled.losses == pytest.approx(without.losses, rel=1e-5)
    for name, value in sampled.state_tensors().items():
        torch.testing.assert_close(value, without.state_tensors()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_network_that_the_dni_can_copy_is_predicted_well() -> None:
    """One linear layer behind the cut under cross-entropy: label_residual can be exact, but for the dropout below."""
    recipe = replace(RECIPE, steps=300)
    plan = replace(PLAN, stages=2, sizes=(6, 1), dni=DNIPlan(form="label_residual", lr=1e-2, every=1), quality_every=10)
    late = run_reference(recipe, plan).qualities[0][-10:]
    assert sum(quality.cosine for quality in late) / 10 > 0.8
    assert all(0.3 < quality.norm_ratio < 3 for quality in late)


@pytest.mark.processes
def test_processes_report_what_the_reference_driver_finds(tmp_path: Path) -> None:
    plan = replace(PLAN, quality_every=3, deterministic=True)
    expected = run_reference(RECIPE, plan).qualities
    result = train(model=model, batches=batches, loss=F.cross_entropy, plan=replace(plan, steps=12), runs=tmp_path)
    for k in (0, 1):
        mine = [record for record in result.judged if record.stage == k]
        assert [record.batch for record in mine] == [2, 5, 8, 11]
        for record, quality in zip(mine, expected[k], strict=True):
            assert (record.cosine, record.norm_ratio, record.error) == (
                quality.cosine,
                quality.norm_ratio,
                quality.error,
            )
    assert [each.samples for each in result.quality] == [2, 2]


def test_the_summary_is_the_median_of_the_second_half() -> None:
    judged = [Judged(0, batch, batch / 10, 1.0, 0.5, 0) for batch in range(8)]
    (found,) = summarised(judged, steps=8)
    assert (found.samples, found.cosine) == (4, pytest.approx(0.55))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan(quality_every=0), "quality_every is 0"),
        (Plan(mode="naive", quality_every=2), "quality_every has no effect with mode naive"),
        (Plan(stages=1, quality_every=2), "quality_every has no effect with 1 stage"),
        (Plan(emulate="stage_ms=1", quality_every=2), "quality_every has no effect with emulate"),
    ],
    ids=str,
)
def test_refused(plan: Plan, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        check_plan(plan)


def test_a_stage_that_trains_nothing_is_judged_at_the_cut() -> None:
    """Once a story: with a lone ReLU between two cuts, quality_every ended the run: grad() of no inputs."""
    plan = Plan(stages=3, sizes=(2, 1, 5), steps=8, quality_every=2, unlock="auto")
    found = run_reference(problems.recipe(), plan).qualities
    assert [len(found[k]) for k in range(2)] == [4, 4]
    assert all(abs(quality.cosine) < 1.001 for quality in found[1])
    assert any(quality.cosine for quality in found[1])
