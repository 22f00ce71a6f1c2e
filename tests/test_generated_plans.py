"""Every plan that the checks let through trains; every other one is refused, with one sentence per mistake.

All combinations of a few values run in the reference driver, and plans that hypothesis draws from all options, with
messages that are late by drawn times. Where a mode is exact, every parameter equals that of a plain loop, bit for bit;
elsewhere every one is finite and has moved. FREEWHEEL_EXAMPLES=1000 draws so many.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from launch import train
from pipeline import Batch, ChannelPlan, DNIPlan, Plan, PlanError, Recipe, run_reference
from pipeline.data.recipe import build_model
from pipeline.plan.check import check_plan
from pipeline.plan.replica_layout import batch_of, plan_of
from pipeline.run.reference import Costs
from pipeline.schedule.modes import MODES
from pipeline.seeding import seed_layer
from tests.oracle import assert_same

STEPS, ROWS, WIDTH, CLASSES = 12, 8, 6, 3
EXAMPLES = int(os.environ.get("FREEWHEEL_EXAMPLES", "60"))


def model() -> nn.Sequential:
    """Every layer of a kind that trains, or is random, in a stage of its own or not."""
    layers = nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)
    return nn.Sequential(*layers)


def batch(index: int) -> Batch:
    """Labels that can be learned."""
    inputs = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index))
    return inputs, inputs[:, :CLASSES].argmax(1)


RECIPE = Recipe(name="generated", model=model, batches=batch, loss=F.cross_entropy)
SIZES = {1: (6,), 2: (3, 3), 3: (2, 2, 2)}


def _plan(stages: int = 3, channel: ChannelPlan | None = None, **options: Any) -> Plan:
    return Plan(stages=stages, sizes=SIZES[stages], steps=STEPS, channel=channel or ChannelPlan(), **options)


@cache
def _alone(microbatches: int, replicas: int) -> dict[str, Tensor]:
    """A plain loop: the mean of the replicas' gradients, each over its own microbatches, before every step."""
    plan, parts = Plan(replicas=replicas), microbatches
    whole = build_model(RECIPE, plan.seed)
    assert isinstance(whole, nn.Sequential)
    optimizer = torch.optim.Adam(whole.parameters(), lr=plan.optimizer.lr, fused=True)
    for step in range(STEPS):
        found = []
        for replica in range(plan.replicas):
            optimizer.zero_grad()
            inputs, labels = batch(batch_of(plan, replica, step))
            for part, (x, y) in enumerate(zip(inputs.chunk(parts), labels.chunk(parts), strict=True)):
                for index, layer in enumerate(whole):
                    seed_layer(plan_of(plan, replica).seed, index, step * parts + part)
                    x = layer(x)
                (F.cross_entropy(x, y) / parts).backward()
            found.append([p.grad.clone() for p in whole.parameters() if p.grad is not None])
        for parameter, gradients in zip(whole.parameters(), zip(*found, strict=True), strict=True):
            parameter.grad = sum(gradients[1:], gradients[0]) / plan.replicas
        optimizer.step()
    return dict(whole.state_dict())


def _right(plan: Plan, state: dict[str, Tensor], late: bool = False) -> None:
    """Until the first target of a DNI has come it predicts zeros: a lower stage may stand still where that is late."""
    if MODES[plan.mode].exact and plan.wire_dtype is None:
        assert_same(state, _alone(plan.microbatches, plan.replicas))
        return
    for name, before in _at_first().items():
        assert torch.isfinite(state[name]).all(), name
        if not late or name.startswith("5."):
            assert not torch.equal(state[name], before), f"{name} has not moved"


@cache
def _at_first() -> dict[str, Tensor]:
    return build_model(RECIPE, Plan().seed).state_dict()


def _problems(plan: Plan) -> tuple[str, ...]:
    try:
        check_plan(plan)
    except PlanError as error:
        return error.problems
    return ()


# ---------------------------------------------------------------- all combinations of a few values

CORE: dict[str, tuple[Any, ...]] = {
    "mode": tuple(MODES),
    "targets": ("bootstrap", "true", "mixed"),
    "microbatches": (1, 4),
    "replicas": (1, 2),
    "slots": (1, 4),
    "gradient_slots": (None, 1),
    "deterministic": (False, True),
}


def _mistakes(mode: str, targets: str, microbatches: int, gradient_slots: int | None, deterministic: bool) -> set[str]:
    """What each sentence must be about, from the meaning of the options alone."""
    locked = mode != "unlocked"
    return {
        name
        for name, wrong in {
            "microbatches": microbatches > 1 and mode not in ("gpipe", "1f1b"),
            "targets": locked and targets != "bootstrap",
            "deterministic": deterministic and (locked or gradient_slots is not None),
            "gradient_slots": mode == "local" and gradient_slots is not None,
        }.items()
        if wrong
    }


@pytest.mark.parametrize("mode", MODES)
def test_all_combinations_train_or_are_refused_for_what_is_wrong(mode: str) -> None:
    trained = 0
    values = [(mode,) if name == "mode" else of for name, of in CORE.items()]
    for _, targets, microbatches, replicas, slots, gradient_slots, deterministic in itertools.product(*values):
        options = {"microbatches": microbatches, "replicas": replicas, "deterministic": deterministic}
        channel = ChannelPlan(slots=slots, gradient_slots=gradient_slots)
        plan = _plan(mode=mode, targets=targets, channel=channel, dni=_dni(mode), **options)
        problems = _problems(plan)
        mistakes = _mistakes(mode, targets, microbatches, gradient_slots, deterministic)
        assert len(problems) == len(mistakes), (plan, problems)
        assert all(any(name in problem for problem in problems) for name in mistakes), (plan, problems)
        if not problems:
            _right(plan, run_reference(RECIPE, plan).state_tensors())
            trained += 1
    assert trained == {"naive": 8, "gpipe": 16, "1f1b": 16, "async-1f1b": 8, "local": 4, "unlocked": 36}[mode]


def _dni(mode: str) -> DNIPlan:
    return DNIPlan(form="linear", every=1) if mode == "unlocked" else DNIPlan()


# ---------------------------------------------------------------- plans drawn from all options


def _or_default(default: Any, *others: Any) -> st.SearchStrategy[Any]:
    """Mostly the default: a plan of twelve odd options is always refused."""
    return st.sampled_from([default] * (3 * len(others)) + list(others))


DNIS = st.builds(
    DNIPlan,
    form=st.sampled_from(["auto", "linear", "mlp", "label_residual", "loss_model"]),
    hidden=_or_default(None, 4),
    rows=_or_default(1.0, 0.5),
    every=_or_default(1, None, 2),
    labels=_or_default(True, False),
)
PLANS = st.builds(
    _plan,
    stages=st.sampled_from([3, 3, 2, 1]),
    mode=st.sampled_from([*MODES, "unlocked", "unlocked", "unlocked"]),
    channel=st.builds(
        ChannelPlan,
        slots=_or_default(4, 1),
        gradient_slots=st.sampled_from([None, None, 1, 2]),
        wire_dtype=_or_default(None, "bf16"),
    ),
    dni=st.one_of(st.just(DNIPlan()), DNIS),
    targets=st.sampled_from(["bootstrap", "true", "mixed"]),
    mix=_or_default(0.5, 0.2),
    microbatches=_or_default(1, 2, 4),
    replicas=_or_default(1, 2),
    average_every=_or_default(8, 3),
    deterministic=_or_default(False, True),
    warmup_steps=_or_default(0, 4),
    unlock=st.sampled_from(["always", "always", "auto"]),
    unlock_cosine=_or_default(0.3, 0.01),
    quality_every=_or_default(None, 2),
    update_probability=_or_default(1.0, 0.7),
    hop_steps=_or_default(0.0, 0.5, 2.0),
    in_flight=_or_default("stages", "full"),
)
LATE = st.lists(st.sampled_from([0, 0, 0, 1, 3, 9]), min_size=1, max_size=7)
"""Ticks, where a step takes three."""


UNLOCKED_ONLY = (
    *("targets", "mix", "dni", "deterministic", "warmup_steps", "unlock", "unlock_cosine", "quality_every"),
    "update_probability",
)


def _tidied(plan: Plan) -> Plan:
    """The plan without most of what would be refused in it."""
    left_out: list[str] = [] if plan.mode == "unlocked" and plan.stages > 1 else [*UNLOCKED_ONLY]
    left_out += [] if plan.targets == "mixed" else ["mix"]
    left_out += [] if plan.unlock == "auto" else ["unlock_cosine"]
    left_out += [] if MODES[plan.mode].cuts_batches else ["microbatches"]
    left_out += [] if plan.replicas > 1 and MODES[plan.mode].averages == "weights" else ["average_every"]
    left_out += [] if plan.mode == "async-1f1b" and plan.hop_steps else ["in_flight"]
    left_out += [] if plan.stages > 1 else ["channel"]
    left_out += ["deterministic"] if plan.channel.gradient_slots or plan.unlock == "auto" else []
    others = plan.replicas > 1 or plan.quality_every or plan.warmup_steps or plan.unlock == "auto"
    left_out += ["update_probability"] if others else []
    return replace(plan, **{name: getattr(Plan(), name) for name in left_out})


@given(plan=st.one_of(PLANS, PLANS.map(_tidied), PLANS.map(_tidied)), late=LATE)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_drawn_plans_train_however_late_messages_are(plan: Plan, late: list[int]) -> None:
    costs = Costs(late=lambda channel, batch: late[(7 * batch + sum(map(ord, channel))) % len(late)])
    try:
        result = run_reference(RECIPE, plan, costs)
    except PlanError as error:
        event("refused")
        _say_what_to_do(error.problems)
        return
    event(plan.mode)
    assert len(result.losses) == STEPS
    _right(plan, result.state_tensors(), late=any(late) or plan.hop_steps > 0 or plan.update_probability < 1)


def _say_what_to_do(problems: tuple[str, ...]) -> None:
    assert len(set(problems)) == len(problems)
    for problem in problems:
        assert ":" in problem, problem
        assert problem.endswith("."), problem


# ---------------------------------------------------------------- in processes

PROCESSES = [
    _plan(2, mode="naive", replicas=2),
    _plan(3, mode="gpipe", microbatches=4, channel=ChannelPlan(slots=1, gradient_slots=1)),
    _plan(3, mode="1f1b", microbatches=4, channels="gloo", channel=ChannelPlan(gradient_slots=1)),
    _plan(3, mode="async-1f1b", channel=ChannelPlan(slots=1, gradient_slots=1)),
    _plan(2, mode="local", channels="gloo", channel=ChannelPlan(slots=1, wire_dtype="bf16")),
    _plan(3, targets="true", deterministic=True, dni=DNIPlan(form="linear", every=1)),
    _plan(2, targets="mixed", replicas=2, warmup_steps=4, dni=DNIPlan(form="linear", every=1)),
    _plan(3, targets="true", unlock="auto", unlock_cosine=0.01, quality_every=2, channel=ChannelPlan(gradient_slots=1)),
]


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("plan", PROCESSES, ids=lambda plan: f"{plan.mode}, {plan.stages} x {plan.replicas}")
def test_a_sample_of_them_trains_in_processes(plan: Plan, tmp_path: Path) -> None:
    result = train(model=model, batches=batch, loss=F.cross_entropy, plan=plan, runs=tmp_path, quiet=True)
    state = result.state_tensors()
    if MODES[plan.mode].exact or plan.deterministic:
        assert_same(state, run_reference(RECIPE, plan).state_tensors())
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert len(result.losses) == STEPS
