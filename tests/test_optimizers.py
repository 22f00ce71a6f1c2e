"""Learning-rate schedules and the rivals' optimizer: by hand, in every mode, bit for bit where training is exact."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.bench.rows import ROWS
from launch.bench.where_rows_run import LOCAL
from launch.setup.recipe_source import GivenRecipe
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import OptimizerPlan, Plan, PlanError, run_reference
from pipeline.data.recipe import build_model
from pipeline.model.optimizers import build_optimizer, described, lr_factor
from pipeline.plan.check import check_plan
from pipeline.seeding import seed_layer
from pipeline.stage.stage import Stage
from tests import problems
from tests.oracle import assert_same, optimizer_tensors

# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("plan", "factors"),
    [
        (OptimizerPlan(), [1, 1, 1, 1, 1, 1]),
        (OptimizerPlan(warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (OptimizerPlan(schedule="linear"), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (OptimizerPlan(schedule="linear", warmup_steps=2), [0.5, 1, 1, 0.75, 0.5, 0.25]),
        (OptimizerPlan(schedule="cosine"), [(1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]),
        (OptimizerPlan(schedule="cosine", warmup_steps=2), [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, 0.146447]),
        (OptimizerPlan(schedule="linear", warmup_steps=9), [n / 9 for n in range(1, 7)]),
    ],
    ids=["constant", "warm-up", "linear", "linear after a warm-up", "cosine", "cosine after a warm-up", "all warm-up"],
)
def test_the_learning_rate_of_every_step(plan: OptimizerPlan, factors: list[float]) -> None:
    factor = lr_factor(plan, 6)
    assert [factor(step) for step in range(6)] == pytest.approx(factors, abs=1e-6)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer(replace(plan, rule="sgd", lr=2.0), [weight], 6)
    assert optimizer is not None
    lengths = []
    for _ in range(6):
        before = float(weight.detach())
        weight.grad = torch.ones(1)
        optimizer.step()
        lengths.append(before - float(weight.detach()))
    assert lengths == pytest.approx([2 * f for f in factors], abs=1e-5), "what the optimizer does is what is said"


SCHEDULED = OptimizerPlan(lr=3e-3, warmup_steps=5, schedule="cosine")


def _alone(plan: Plan) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A plain loop with torch's scheduler, as anybody would write it."""
    torch.manual_seed(0)
    model = build_model(problems.recipe(), plan.seed)
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.optimizer.lr, fused=True)
    warmup, steps = plan.optimizer.warmup_steps, plan.steps or 0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * ((step - warmup) / (steps - warmup)))) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(steps):
        x, labels = problems.batch(step)
        optimizer.zero_grad()
        for index, layer in enumerate(model):
            seed_layer(plan.seed, index, step)
            x = layer(x)
        torch.nn.functional.cross_entropy(x, labels).backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer


@pytest.mark.parametrize("stages", [1, 3])
def test_locked_training_equals_a_plain_loop_under_the_same_schedule(stages: int) -> None:
    plan = Plan(mode="naive", stages=stages, steps=17, optimizer=SCHEDULED)
    result = run_reference(problems.recipe(), plan)
    model, optimizer = _alone(plan)
    assert_same(result.state_tensors(), dict(model.state_dict()))
    assert_same(result.optimizer_tensors(), optimizer_tensors(model, optimizer))


@pytest.mark.processes
def test_processes_follow_the_schedule_too(tmp_path: Path) -> None:
    source = GivenRecipe(problems.recipe())
    plan = Plan(mode="1f1b", sizes=(4, 4), steps=17, optimizer=SCHEDULED)
    result = run(source, resolve_source(source, plan), tmp_path, "r", Console(quiet=True))
    assert_same(result.state_tensors(), dict(_alone(plan)[0].state_dict()))


@pytest.mark.parametrize("mode", ["unlocked", "async-1f1b", "local"])
def test_every_stage_of_every_mode_follows_the_schedule(mode: str) -> None:
    optimizer = OptimizerPlan(rule="sgd", lr=0.1, schedule="linear", warmup_steps=4)
    result = run_reference(problems.recipe(), Plan(mode=mode, stages=3, steps=12, optimizer=optimizer))
    assert [_lr(stage) for stage in result.stages] == [0.0, 0.0, 0.0], "after the last of 12 steps"
    early = run_reference(
        problems.recipe(), Plan(mode=mode, stages=3, steps=12, optimizer=optimizer, until="loss=1e9", evaluate_every=6)
    )
    assert early.reached == 6
    for stage in early.stages:
        assert 0.1 / 8 <= _lr(stage) <= 0.1 * 6 / 8, "ended early, the schedule is where it was"


def _lr(stage: Stage) -> float:
    assert stage.optimizer is not None
    return float(stage.optimizer.param_groups[0]["lr"])


# ---------------------------------------------------------------- NAdamW


def test_nadamw_by_hand() -> None:
    """The update of the docstring, written out for one number, with weight decay."""
    plan = OptimizerPlan(rule="nadamw", lr=0.1, weight_decay=0.02)
    weight = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimizer = build_optimizer(plan, [weight])
    assert optimizer is not None
    w, m, v, product = 0.5, 0.0, 0.0, 1.0
    for t, g in enumerate([0.3, -1.0, 0.7, 0.2, 0.1], start=1):
        weight.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        mu, later = (0.99 * (1 - 0.5 * 0.96 ** (0.004 * n)) for n in (t, t + 1))
        product *= mu
        w -= 0.1 * 0.02 * w
        m, v = 0.99 * m + 0.01 * g, 0.999 * v + 0.001 * g * g
        step = (1 - mu) * g / (1 - product) + later * m / (1 - product * later)
        w -= 0.1 * step / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert float(weight.detach()) == pytest.approx(w, rel=1e-6), "torch keeps the product of mu in single precision"


@pytest.mark.parametrize("mode", ["naive", "unlocked", "async-1f1b", "local"])
def test_every_mode_takes_it_and_learns(mode: str) -> None:
    plan = Plan(mode=mode, steps=150, optimizer=OptimizerPlan(rule="nadamw", lr=3e-3, warmup_steps=15))
    result = run_reference(replace(problems.recipe(), evaluation=None), plan)
    assert sum(result.losses[-20:]) < 0.8 * sum(result.losses[:20])
    assert "0.weight.mu_product" in result.optimizer_tensors()


@pytest.mark.processes
def test_the_row_of_the_rival(tmp_path: Path) -> None:
    """Asynchronous 1F1B as Ajanthan et al. train it: its own optimizer, a warm-up of a tenth, and its own line."""
    source = GivenRecipe(problems.recipe())
    resolved = resolve_source(source, Plan(steps=20, sizes=(4, 4)))
    contender = ROWS["async-1f1b-nadamw"](source, resolved, tmp_path, LOCAL)
    outcome = contender.train(tmp_path, "rival")
    assert (contender.mode, contender.variant) == ("async-1f1b", "nadamw")
    plan = replace(
        resolved.plan, mode="async-1f1b", optimizer=OptimizerPlan(rule="nadamw", warmup_steps=2), dni=type(Plan().dni)()
    )
    assert outcome.loss == pytest.approx(run_reference(problems.recipe(), plan).scores[-1][1].loss(), rel=1e-6)


# ---------------------------------------------------------------- what the user asks for, and sees


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (OptimizerPlan(), "adam, lr 0.001"),
        (OptimizerPlan(rule="nadamw", warmup_steps=200), "nadamw, lr 0.001, momentum 0.99, warm-up of 200 steps"),
        (OptimizerPlan(rule="sgd", lr=0.1, schedule="cosine", clip=1), "sgd, lr 0.1, cosine to 0, clip 1"),
    ],
)
def test_it_is_described(plan: OptimizerPlan, text: str) -> None:
    assert described(plan) == text


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (OptimizerPlan(schedule="step"), "schedule"),  # type: ignore[arg-type]
        (OptimizerPlan(warmup_steps=-1), r"optimizer\.warmup_steps is -1: it must be a whole number, at least 0\."),
        (OptimizerPlan(rule="nadamw", momentum=1.0), r"optimizer\.momentum is 1\.0: with nadamw it must lie in \[0, 1"),
        (OptimizerPlan(rule="adamw", momentum=0.9), r"optimizer\.momentum has no effect with adamw"),
    ],
)
def test_what_cannot_be_is_refused(plan: OptimizerPlan, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        check_plan(Plan(optimizer=plan))
