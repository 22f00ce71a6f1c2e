"""Unlocked training: repeatable when asked, and really unlocked, shown from the spans."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same

from launch import Result, RunFailed, train
from pipeline import DNIPlan, OptimizerPlan, Plan, run_reference
from pipeline.metrics.spans import Span


def _train(plan: Plan, runs: Path, **recipe: Any) -> Result:
    parts: dict[str, Any] = {
        "model": problems.dropout_and_batch_norm,
        "batches": problems.batch,
        "loss": F.cross_entropy,
        "evaluation": problems.held_out,
    }
    return train(**{**parts, **recipe}, plan=plan, runs=runs, quiet=True)


@pytest.mark.processes
@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
@pytest.mark.parametrize("sizes", [(4, 4), (1, 3, 2, 2)], ids=str)
def test_a_deterministic_run_of_processes_equals_the_reference_driver_bit_for_bit(
    targets: str, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    plan = Plan(stages=len(sizes), sizes=sizes, steps=30, targets=targets, deterministic=True, evaluate_every=10)
    truth = run_reference(problems.recipe(), plan)
    mine = _train(plan, tmp_path)
    assert_same(mine.state_tensors(), truth.state_tensors())
    assert_same(mine.optimizer_tensors(), truth.optimizer_tensors())
    assert mine.losses == truth.losses
    assert [scored.loss for scored in mine.scores] == [scores.loss() for _, scores in truth.scores]


@pytest.mark.processes
def test_a_deterministic_run_repeats_with_a_delay_and_every_form(tmp_path: Path) -> None:
    for form in ("linear", "mlp", "label_residual", "loss_model"):
        plan = Plan(stages=3, sizes=(3, 3, 2), steps=15, dni=DNIPlan(form=form), deterministic=True, hop_steps=1.5)
        assert_same(_train(plan, tmp_path).state_tensors(), run_reference(problems.recipe(), plan).state_tensors())


def test_unlocked_training_learns_under_plain_sgd_as_backpropagation_does() -> None:
    """SGD sees the size of a synthetic gradient, where Adam sees its direction: too short by 50, nothing is learned."""
    plan = Plan(stages=3, sizes=(3, 3, 2), steps=200, hop_steps=1.0, optimizer=OptimizerPlan(rule="sgd", lr=0.1))
    locked, unlocked = (run_reference(problems.recipe(), replace(plan, mode=mode)) for mode in ("naive", "unlocked"))
    ends = [sum(result.losses[-20:]) / 20 for result in (locked, unlocked)]
    assert ends[1] < 1.15 * ends[0] < 0.6 * locked.losses[0]


@pytest.mark.processes
def test_stage_0_updates_before_the_true_gradient_exists(tmp_path: Path) -> None:
    """K = 2: the step of batch b at stage 0 ends before the last stage's backward of b does, for every batch.

    Made certain, not likely: the last stage's forward of batch b waits until stage 0 has begun its forward of b + 1,
    which it does only after its step of b. A locked run cannot pass this (the next test).
    """
    steps = 30
    with problems.told(steps) as name:
        result = _train(
            Plan(stages=2, sizes=(2, 2), steps=steps), tmp_path, model=partial(problems.listening, name, steps)
        )
    below, above = result.spans
    updated, exists = below.last_end(Span.STEP), above.last_end(Span.BACKWARD)
    assert sorted(updated) == sorted(exists) == list(range(steps))
    assert all(updated[b] < exists[b] for b in range(steps - 1))


@pytest.mark.processes
def test_a_locked_stage_0_cannot_do_that(tmp_path: Path) -> None:
    """The same network in a locked run: stage 0 waits for the gradient of batch 0, so batch 1 never begins."""
    with problems.told(30) as name, pytest.raises(RunFailed, match="stage 0 has not gone on to the next batch"):
        _train(
            Plan(mode="naive", stages=2, sizes=(2, 2), steps=30),
            tmp_path,
            model=partial(problems.listening, name, 30, 0.5),
        )


@pytest.mark.processes
def test_locked_stage_0_updates_only_after_the_true_gradient(tmp_path: Path) -> None:
    """The same measurement in the locked mode shows the opposite: it is not an artefact of the clock."""
    result = _train(Plan(mode="naive", stages=2, sizes=(4, 4), steps=30), tmp_path)
    below, above = result.spans
    updated, exists = below.last_end(Span.STEP), above.last_end(Span.BACKWARD)
    assert all(updated[b] > exists[b] for b in range(30))


@pytest.mark.processes
def test_spans_add_up_to_the_wall_time(tmp_path: Path) -> None:
    result = _train(Plan(stages=3, sizes=(3, 3, 2), steps=40), tmp_path)
    for spans in result.spans:
        assert np.all(spans.start_ns[1:] == spans.end_ns[:-1]), "no gap and no overlap"
        wall_s = (int(spans.end_ns[-1]) - int(spans.start_ns[0])) * 1e-9
        assert spans.seconds() == pytest.approx(wall_s, rel=1e-9)
    for stage in result.measured.stages:
        assert sum(stage.shares.values()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.processes
def test_a_shallow_gradient_channel_drops_the_oldest_targets_and_counts_them(tmp_path: Path) -> None:
    from pipeline import ChannelPlan

    every = DNIPlan(every=1)
    plan = Plan(stages=2, sizes=(1, 7), steps=60, dni=every, channel=ChannelPlan(slots=8, gradient_slots=1))
    result = _train(plan, tmp_path)
    below = result.finished[0]
    assert below.updated == 60
    assert below.learned + result.finished[1].dropped == 60


def test_zero_gradients_until_the_first_target_leave_the_weights_alone() -> None:
    """No update is better than a random one: with SGD and a long hop, stage 0 stands still until it has learned."""
    from pipeline import OptimizerPlan
    from pipeline.data.recipe import build_model

    plan = Plan(stages=2, sizes=(4, 4), steps=2, hop_steps=4, optimizer=OptimizerPlan(rule="sgd", lr=0.1))
    after = run_reference(problems.recipe(), plan).state_tensors()
    before = build_model(problems.recipe(), plan.seed).state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["7.weight"], before["7.weight"])
