"""Locked training is exact: however the network is split, it equals single-process training, bit for bit."""

from __future__ import annotations

from pathlib import Path

import problems
import pytest
import torch
from oracle import assert_same, optimizer_tensors, train_alone
from safetensors.torch import load_file

from launch import train
from pipeline import Plan, correct_predictions, run_reference
from pipeline.recipe import build_model

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
