"""Locked training is exact: however the network is split, it equals single-process training, bit for bit."""

from __future__ import annotations

from pathlib import Path

import problems
import pytest
import torch
from oracle import assert_same, optimizer_tensors, train_alone
from safetensors.torch import load_file

from launch import train
from pipeline import OptimizerPlan, Plan, correct_predictions, run_reference
from pipeline.data.recipe import build_model

SPLITS = [(8,), (4, 4), (1, 7), (2, 3, 3), (1, 5, 2), (2, 2, 2, 2), (1, 3, 2, 2)]
PLAN = Plan(mode="naive", steps=20)


def _plan(sizes: tuple[int, ...]) -> Plan:
    return Plan(mode="naive", steps=20, stages=len(sizes), sizes=sizes)


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_reference_driver_equals_single_process(sizes: tuple[int, ...]) -> None:
    """Every parameter, buffer and optimizer state after 20 steps, with dropout and BatchNorm: equal to the last bit."""
    model, optimizer, losses = train_alone(problems.recipe(), PLAN)
    mine = run_reference(problems.recipe(), _plan(sizes))
    assert_same(mine.state_tensors(), dict(model.state_dict()))
    assert_same(mine.optimizer_tensors(), optimizer_tensors(model, optimizer))
    assert mine.losses == losses


@pytest.mark.processes
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 5, 2), (1, 3, 2, 2)], ids=str)
def test_processes_equal_single_process(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """The same through real processes and channels, and the exported file loads into the plain model, strict."""
    model, optimizer, losses = train_alone(problems.recipe(), PLAN)
    result = train(
        model=problems.dropout_and_batch_norm,
        batches=problems.batch,
        loss=torch.nn.functional.cross_entropy,
        evaluation=problems.held_out,
        correct=correct_predictions,
        plan=_plan(sizes),
        runs=tmp_path,
        quiet=True,
    )
    assert_same(result.state_tensors(), dict(model.state_dict()))
    assert_same(result.optimizer_tensors(), optimizer_tensors(model, optimizer))
    assert result.losses == losses

    fresh = build_model(problems.recipe(), seed=99)
    fresh.load_state_dict(load_file(result.export(tmp_path / "model.safetensors")), strict=True)
    fresh.eval()
    with torch.no_grad():
        right = [correct_predictions(fresh(x), y) for x, y in problems.held_out()]
    assert result.accuracy == sum(int(r) for r, _ in right) / sum(n for _, n in right)


def test_recurring_evaluation_does_not_change_training() -> None:
    """A pass over the held-out batches leaves no trace in weights, running means or random numbers."""
    plain = run_reference(problems.recipe(), _plan((4, 4)))
    evaluated = run_reference(problems.recipe(), Plan(mode="naive", steps=20, stages=2, sizes=(4, 4), evaluate_every=3))
    assert [updates for updates, _ in evaluated.scores] == [3, 6, 9, 12, 15, 18, 20]
    assert_same(evaluated.state_tensors(), plain.state_tensors())


@pytest.mark.parametrize("mode", ["gpipe", "1f1b"])
@pytest.mark.parametrize("sizes", [(4, 4), (1, 5, 2), (1, 3, 2, 2)], ids=str)
def test_microbatch_schedules_equal_single_process_over_the_same_microbatches(
    mode: str, sizes: tuple[int, ...]
) -> None:
    """GPipe and 1F1B only reorder: the same gradients add up, to the last bit, in the same order."""
    plan = Plan(mode=mode, steps=20, microbatches=4, stages=len(sizes), sizes=sizes)
    model, optimizer, losses = train_alone(problems.recipe(), plan)
    mine = run_reference(problems.recipe(), plan)
    assert_same(mine.state_tensors(), dict(model.state_dict()))
    assert_same(mine.optimizer_tensors(), optimizer_tensors(model, optimizer))
    assert mine.losses == losses


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["gpipe", "1f1b", "async-1f1b", "local"])
def test_processes_equal_the_reference_driver(mode: str, tmp_path: Path) -> None:
    """The order of these modes does not depend on time: processes give the reference driver's very numbers."""
    parts = 4 if mode in ("gpipe", "1f1b") else 1
    plan = Plan(mode=mode, steps=20, microbatches=parts, stages=3, sizes=(1, 5, 2))
    truth = run_reference(problems.recipe(), plan)
    mine = train(
        model=problems.dropout_and_batch_norm,
        batches=problems.batch,
        loss=torch.nn.functional.cross_entropy,
        plan=plan,
        runs=tmp_path,
        quiet=True,
    )
    assert_same(mine.state_tensors(), truth.state_tensors())
    assert_same(mine.optimizer_tensors(), truth.optimizer_tensors())
    assert mine.losses == truth.losses


def test_async_1f1b_applies_gradients_taken_at_the_weights_of_their_forward_pass() -> None:
    """By hand, two linear layers and SGD: the step of batch b uses the gradient at the weights b was forwarded with."""
    plan = Plan(mode="async-1f1b", stages=2, steps=6, sizes=(1, 1), optimizer=OptimizerPlan(rule="sgd", lr=0.1))
    mine = run_reference(problems.two_linear_recipe(), plan).state_tensors()
    lower, upper = (layer.weight.detach().clone() for layer in build_model(problems.two_linear_recipe(), 0))
    pending: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(6):  # stage 0 keeps two batches open: the step of b lands after the forward of b + 1
        x, labels = problems.two_linear_recipe().batch(step)
        h = x @ lower.T
        residual = ((h @ upper.T).softmax(1) - torch.nn.functional.one_hot(labels, upper.shape[0])) / len(x)
        pending.append((residual @ upper, x))
        upper = upper - 0.1 * residual.T @ h
        if len(pending) == 2:
            gradient, inputs = pending.pop(0)
            lower = lower - 0.1 * gradient.T @ inputs
    gradient, inputs = pending.pop()
    torch.testing.assert_close(mine["0.weight"], lower - 0.1 * gradient.T @ inputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine["1.weight"], upper, rtol=1e-5, atol=1e-6)
