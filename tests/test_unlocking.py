"""Warm-up and ``unlock auto``: who waits for what, what is learned meanwhile, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.setup.recipe_source import GivenRecipe
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console, switch_line, switch_summary
from launch.training import run
from pipeline import DNIPlan, OptimizerPlan, Plan, PlanError, run_reference
from pipeline.messages.bundle import Item, present
from pipeline.plan.check import check_plan
from pipeline.run.hollow_stage import HollowStage
from pipeline.run.reference import Costs, Reference
from pipeline.run.resolve import resolve
from pipeline.schedule.policies import Action, View, averaged, unlocked
from pipeline.stage.dni_quality import Quality
from pipeline.stage.gradient_flow import Flow, Locks
from pipeline.stage.unlock import Lock, Switch
from tests import problems
from tests.oracle import assert_same, train_alone
from tests.test_policies import diagram
from workers.telemetry.records import Switched

SIZES = (2, 3, 3)
# ---------------------------------------------------------------- the order of actions


def test_a_warm_up_is_naive_and_then_nobody_waits() -> None:
    plan = Plan(stages=3, steps=4, warmup_steps=2)
    assert diagram(plan, Costs(forward=1, backward=1)) == [
        "F0 .  .  .  .  B0 F1 .  .  .  .  B1 F2 U2 F3 U3",
        ".  F0 .  .  B0 .  .  F1 .  .  B1 .  .  F2 U2 F3 U3",
        ".  .  F0 U0 .  .  .  .  F1 U1 .  .  .  .  F2 U2 F3 U3",
    ]


class _Locked(HollowStage):
    """One cut is locked in every batch."""

    def __init__(self, index: int, plan: Plan, cut: int) -> None:
        super().__init__(index, plan)
        self._flow = _LockedFlow(plan, index, cut)


@dataclass(frozen=True)
class _LockedFlow(Flow):
    """It says so from the first batch to the last."""

    cut: int

    def warm_up(self, batch: int) -> Locks:
        return Locks(mine=self.index == self.cut, below=self.index == self.cut + 1)


def _with_locked_cut(cut: int) -> list[str]:
    plan = Plan(stages=3, steps=2 if cut == 0 else 4)
    return diagram(plan, Costs(forward=1, backward=1), [_Locked(k, plan, cut) for k in range(3)])


def test_below_an_unlocked_cut_a_locked_stage_waits_for_the_next_stage_alone() -> None:
    assert _with_locked_cut(0) == [
        "F0 .  .  B0 F1 .  .  B1",
        ".  F0 U0 .  .  F1 U1",
        ".  .  F0 U0 .  .  F1 U1",
    ]


def test_below_a_locked_stage_one_that_is_not_goes_on() -> None:
    assert _with_locked_cut(1) == [
        "F0 U0 F1 U1 F2 U2 F3 U3",
        ".  F0 .  .  B0 F1 .  .  B1 F2 .  .  B2 F3 .  .  B3",
        ".  .  F0 U0 .  .  F1 U1 .  .  F2 U2 .  .  F3 U3",
    ]


@pytest.mark.parametrize(
    ("view", "action"),
    [
        (View(forwarded=1, locked=True), Action.WAIT),
        (View(forwarded=1, locked=True, activation=True), Action.WAIT),
        (View(forwarded=1, locked=True, gradient=True), Action.BACKWARD),
        (View(forwarded=1, locked=True, gradient=True, late=True), Action.LEARN),
        (View(forwarded=1, gradient=True, late=True), Action.UPDATE),
        (View(forwarded=1, backwarded=1, gradient=True, late=True, activation=True), Action.LEARN),
        (View(forwarded=1, backwarded=1, activation=True, locked=True), Action.FORWARD),
    ],
    ids=["waits", "takes no batch meanwhile", "its own", "an older one", "not locked", "none is open", "nothing open"],
)
def test_what_a_locked_stage_does_next(view: View, action: Action) -> None:
    assert unlocked(view) is action


def test_no_average_while_a_locked_stage_waits() -> None:
    """Its graph hangs on the weights."""
    policy = averaged(unlocked)
    assert policy(View(forwarded=1, locked=True, average=True)) is Action.WAIT
    assert policy(View(forwarded=1, locked=True, average=True, gradient=True)) is Action.BACKWARD
    assert policy(View(forwarded=1, backwarded=1, locked=True, average=True)) is Action.AVERAGE


@pytest.mark.parametrize("targets", ["bootstrap", "true"])
def test_what_is_sent_to_a_locked_stage(targets: str) -> None:
    """Of three stages, every second batch gives a target: to a locked stage every batch does, at the update."""
    flow = Flow(Plan(stages=3, targets=targets, dni=DNIPlan(every=2)), 1)
    bootstrap = targets == "bootstrap"
    table = [
        (route.sends_now, route.relays, route.wants_target)
        for locks in (Locks(), Locks(below=True), Locks(mine=True), Locks(mine=True, below=True))
        for route in (flow.route(batch, locks) for batch in (0, 1))
    ]
    assert table == [
        (bootstrap, not bootstrap, True),
        (False, False, False),
        (True, False, True),  # below: the whole, of every batch
        (True, False, False),
        (True, False, True),  # mine: the true gradient is what this stage updates with
        (False, False, False),
        (True, False, True),
        (True, False, False),
    ]


# ---------------------------------------------------------------- what is learned


@pytest.mark.parametrize("hop", [0.0, 2.0])
@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
def test_a_run_that_is_all_warm_up_is_backpropagation_bit_for_bit(targets: str, hop: float) -> None:
    plan = Plan(stages=3, steps=14, warmup_steps=14, targets=targets, hop_steps=hop, quality_every=5)
    result = run_reference(problems.recipe(), plan)
    model, _, losses = train_alone(problems.recipe(), replace(plan, mode="naive"))
    assert_same(result.state_tensors(), dict(model.state_dict()))
    assert result.losses == losses
    assert [len(result.qualities[k]) for k in range(2)] == [2, 2], "samples are judged while locked as well"
    assert result.switches == []


def test_dnis_learn_in_the_warm_up_and_only_the_batches_after_it_use_them() -> None:
    """With plain SGD and DNIs that start at zero, the first step of a cold start does nothing to the lower stage."""
    sgd = OptimizerPlan(rule="sgd", lr=0.05)
    plan = Plan(stages=2, steps=41, warmup_steps=40, optimizer=sgd, dni=DNIPlan(every=1))
    warm, locked = (run_reference(problems.recipe(), replace(plan, warmup_steps=n)) for n in (40, 41))
    assert warm.losses[:40] == locked.losses[:40]
    first = warm.stages[0]
    assert first.dni is not None
    assert float(first.dni.sigma) > 0
    assert first.dni.state()["num_targets"] == 41, "it learned from every batch, the last one included"
    differs = [not torch.equal(a, locked.state_tensors()[n]) for n, a in warm.state_tensors().items() if n[0] < "4"]
    assert any(differs), "the last batch was updated from a prediction"
    assert warm.switches == [Switch(0, 40, False)]


def test_a_stage_below_an_unlocked_cut_updates_from_what_that_cut_predicts() -> None:
    """Cut 0 locked, cut 1 not: stage 0 gets J^T s through stage 1, for all samples, where a target has a quarter."""
    plan = Plan(stages=3, steps=1, optimizer=OptimizerPlan(rule="sgd", lr=0.1), dni=DNIPlan(rows=0.25))
    recipe = replace(problems.recipe(), model=problems.eight_linear, batches=_of_six, evaluation=None)
    result = run_reference(recipe, replace(plan, steps=9))
    below, middle = result.stages[0], result.stages[1]
    assert below.dni is not None
    x, labels = recipe.batch(9)
    stage = result.stages[0]
    item = Item(9)
    h0 = stage.forward(item, (x,), (labels,))
    h1 = middle.forward(item, h0, (labels,), awaited=True)
    s = middle.predict(item)
    sent = middle.backward(item, s)
    assert s is not None
    assert sent is not None
    product = present(s[0])
    for layer in reversed(middle.layers):
        weight = layer.module.weight
        assert isinstance(weight, torch.Tensor)
        product = product @ weight
    assert present(sent[0]).shape == present(h0[0]).shape == (problems.ROWS, 6)
    assert present(h1[0]).shape == product.shape
    torch.testing.assert_close(sent[0], product.detach())


def _of_six(index: int) -> Any:
    inputs, labels = problems.batch(index, width=6)
    return inputs, labels % 3


# ---------------------------------------------------------------- auto


def _quality(cosine: float, ratio: float = 1.0) -> Quality:
    return Quality(0, cosine, ratio, 1.0)


def _states(samples: list[Quality | None], **options: Any) -> str:
    """One letter per batch, L or U, when the sample of each comes in before the next batch."""
    lock, letters = Lock(Plan(unlock="auto", **options), 0), ""
    for batch, sample in enumerate(samples):
        letters += "L" if lock.decide(batch) else "U"
        if sample is not None:
            lock.judged(sample)
    return letters


GOOD, FAIR, BAD = _quality(0.5), _quality(0.2), _quality(0.05)


@pytest.mark.parametrize(
    ("samples", "states"),
    [
        ([GOOD] * 6, "LLLUUU"),
        ([FAIR] * 6, "LLLLLL"),
        ([GOOD] * 3 + [FAIR] * 6, "LLLUUUUUU"),
        ([GOOD] * 3 + [BAD] * 6, "LLLUUULLL"),
        ([GOOD] * 3 + [BAD] * 3 + [GOOD] * 4, "LLLUUULLLU"),
        ([BAD, GOOD, GOOD, GOOD, None, None], "LLLUUU"),
        ([_quality(0.9, 50.0)] * 6, "LLLLLL"),
        ([_quality(0.9, 15.0)] * 6, "LLLLLL"),
        ([GOOD] * 3 + [_quality(0.9, 15.0)] * 4, "LLLUUUU"),
        ([GOOD] * 3 + [_quality(0.9, 50.0)] * 4, "LLLUUUL"),
        ([_quality(0.9, 0.0)] * 5, "LLLLL"),
        ([_quality(0.9, 1e-3)] * 4, "LLLU"),
        ([_quality(float("nan"))] * 5, "LLLLL"),
        ([GOOD] * 3 + [_quality(float("nan"))] * 4, "LLLUUUL"),
    ],
    ids=[
        "good", "fair", "fair is enough to stay", "bad", "and good again", "a mean of three", "far too large",
        "too large", "not too large to stay", "far too large to stay", "nothing", "small", "not a number",
        "not a number any more",
    ],
)  # fmt: skip
def test_three_samples_decide_with_hysteresis(samples: list[Quality | None], states: str) -> None:
    assert _states(samples) == states


def test_a_warm_up_comes_first() -> None:
    assert _states([GOOD] * 8, warmup_steps=5) == "LLLLLUUU"
    lock = Lock(Plan(warmup_steps=2), 0)
    assert [lock.decide(batch) for batch in range(4)] == [True, True, False, False]
    assert [Lock(Plan(warmup_steps=2), 1).decide(batch) for batch in range(3)] == [False] * 3, "the last stage"
    assert not Lock(Plan(mode="naive"), 0).decide(0)


def test_a_switch_says_what_led_to_it_once() -> None:
    lock = Lock(Plan(unlock="auto", stages=3), 1)
    for batch, (cosine, ratio) in enumerate([(0.4, 0.1), (0.5, 0.4), (0.6, 1.6)]):
        lock.decide(batch)
        lock.judged(_quality(cosine, ratio))
    assert lock.switched() is None
    lock.decide(3)
    switch = lock.switched()
    assert switch == Switch(1, 3, False, pytest.approx(0.5), pytest.approx(0.4))
    assert lock.switched() is None


def _auto(**options: Any) -> Plan:
    return Plan(
        **{"stages": 3, "sizes": SIZES, "steps": 120, "unlock": "auto", "quality_every": 4, "hop_steps": 1.0, **options}
    )


@pytest.fixture(scope="module")
def automatic() -> Reference:
    """A run whose stages unlock."""
    return run_reference(problems.recipe(), _auto(unlock_cosine=0.2))


def test_stages_unlock_where_their_dnis_are_good_enough(automatic: Reference) -> None:
    assert {switch.stage for switch in automatic.switches} == {0, 1}
    for stage in range(2):
        mine = [switch for switch in automatic.switches if switch.stage == stage]
        assert [switch.locked for switch in mine] == [n % 2 == 1 for n in range(len(mine))], "in turns"
        for switch in mine:
            assert switch.cosine is not None
            assert switch.cosine < 0.2 / 3 or not switch.locked
            assert switch.cosine >= 0.2 or switch.locked
    assert len(automatic.qualities[0]) == len(automatic.qualities[1]) == 30, "every sample was judged, locked or not"


def test_before_the_first_switch_nothing_differs_from_backpropagation(automatic: Reference) -> None:
    first = min(switch.batch for switch in automatic.switches)
    _, _, losses = train_alone(problems.recipe(), Plan(mode="naive", steps=first))
    assert first >= 12
    assert automatic.losses[:first] == losses


def test_decisions_repeat_in_the_reference_driver(automatic: Reference) -> None:
    again = run_reference(problems.recipe(), _auto(unlock_cosine=0.2))
    assert again.switches == automatic.switches
    assert_same(again.state_tensors(), automatic.state_tensors())


def test_where_no_dni_is_good_enough_the_whole_run_is_backpropagation() -> None:
    result = run_reference(problems.recipe(), _auto(unlock_cosine=1.0, steps=40))
    model, _, _ = train_alone(problems.recipe(), Plan(mode="naive", steps=40))
    assert result.switches == []
    assert_same(result.state_tensors(), dict(model.state_dict()))


def test_a_dni_that_goes_bad_locks_its_stage_again() -> None:
    """After the run has unlocked, the first DNI is turned round: what it predicts points the wrong way."""
    result = run_reference(problems.recipe(), _auto(unlock_cosine=0.2, dni=DNIPlan(factory=_turns_round), steps=200))
    mine = [switch for switch in result.switches if switch.stage == 1]
    assert [switch.locked for switch in mine[:2]] == [False, True]
    assert mine[1].cosine is not None
    assert mine[1].cosine < 0.2 / 3, "of the last three samples, of which the first may be from before"


class _TurnsRound(torch.nn.Module):
    """A local classifier's gradient at first; from a number of trainings on its negative."""

    def __init__(self, features: int, classes: int, after: int) -> None:
        super().__init__()
        self.scores = torch.nn.Linear(features, classes)
        self.back = torch.nn.Linear(classes, features, bias=False)
        self.left = after

    def forward(self, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[rows, features] -> the same."""
        self.left -= torch.is_grad_enabled()
        wrong = self.scores(h).softmax(1) - torch.nn.functional.one_hot(labels, self.scores.out_features)
        predicted: torch.Tensor = self.back(wrong)
        return predicted if self.left > 0 else -20 * predicted.detach() + 0 * predicted


def _turns_round(cut: Any) -> torch.nn.Module:
    return _TurnsRound(cut.activation.shape[1], problems.CLASSES, after=80 if cut.index == 1 else 10_000)


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A warm-up in processes, then on their own."""
    source = GivenRecipe(problems.recipe())
    plan = Plan(stages=3, sizes=(3, 2, 3), steps=60, warmup_steps=30, deterministic=True, hop_steps=1.0)
    return run(source, resolve_source(source, plan), tmp_path_factory.mktemp("runs"), "w", Console(quiet=True)), plan


@pytest.mark.processes
def test_processes_do_the_same_as_the_reference_driver(in_processes: Any) -> None:
    result, plan = in_processes
    truth = run_reference(problems.recipe(), plan)
    assert_same(result.state_tensors(), truth.state_tensors())
    assert result.losses == truth.losses


@pytest.mark.processes
def test_every_switch_is_an_event_a_line_and_part_of_the_summary(in_processes: Any) -> None:
    result, _ = in_processes
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    events = sorted((e for e in map(json.loads, lines) if e["event"] == "switch"), key=lambda e: e["stage"])
    assert [(e["stage"], e["batch"], e["locked"], e["cosine"]) for e in events] == [
        (0, 30, False, None),
        (1, 30, False, None),
    ]
    assert sorted(map(switch_line, result.switches)) == [
        "stage 0 unlocked at batch 30 (the warm-up is over)",
        "stage 1 unlocked at batch 30 (the warm-up is over)",
    ]
    assert list(switch_summary(result)) == [
        "stage 0: unlocked for 50% of the batches, 1 switch",
        "stage 1: unlocked for 50% of the batches, 1 switch",
    ]
    assert len(result.as_dict()["switches"]) == 2


@pytest.mark.processes
def test_auto_in_processes_never_good_enough_is_backpropagation(tmp_path: Path) -> None:
    """How many samples are in time depends on the machine; that none suffices does not."""
    source = GivenRecipe(problems.recipe())
    plan = Plan(stages=3, sizes=(3, 2, 3), steps=24, unlock="auto", unlock_cosine=1.0, quality_every=3)
    result = run(source, resolve_source(source, plan), tmp_path, "a", Console(quiet=True))
    model, _, _ = train_alone(problems.recipe(), Plan(mode="naive", steps=24))
    assert_same(result.state_tensors(), dict(model.state_dict()))
    assert {record.stage for record in result.judged} == {0, 1}
    assert list(switch_summary(result)) == [f"stage {k}: unlocked for 0% of the batches, 0 switches" for k in (0, 1)]


@pytest.mark.processes
def test_auto_in_processes_unlocks_and_goes_on(tmp_path: Path) -> None:
    """Any cosine will do: so every stage unlocks at latest when its third sample was judged and a batch came in."""
    source = GivenRecipe(replace(problems.recipe(), steps=200))
    plan = Plan(stages=3, sizes=(3, 2, 3), steps=200, unlock="auto", unlock_cosine=1e-9, quality_every=2)
    result = run(source, resolve_source(source, plan), tmp_path, "a", Console(quiet=True))
    assert result.steps == 200
    first = {record.stage: record for record in reversed(result.switches)}
    assert set(first) == {0, 1}
    assert not any(record.locked for record in first.values())


@pytest.mark.processes
def test_replicas_warm_up_too(tmp_path: Path) -> None:
    source = GivenRecipe(problems.recipe())
    plan = Plan(sizes=(4, 4), replicas=2, steps=40, warmup_steps=20, average_every=4, deterministic=True)
    result = run(source, resolve_source(source, plan), tmp_path, "r", Console(quiet=True))
    assert_same(result.state_tensors(), run_reference(problems.recipe(), plan).state_tensors())
    assert sorted((s.stage, s.replica, s.batch) for s in result.switches) == [(0, 0, 20), (0, 1, 20)]


# ---------------------------------------------------------------- what the user asks for, and sees


def test_auto_says_what_it_does_before_it_starts() -> None:
    resolved = resolve(problems.recipe(), Plan(unlock="auto", warmup_steps=7))
    assert resolved.plan.quality_every == 20
    said = {what: (value, why) for what, value, why in resolved.reasons}
    assert said["warm-up"] == ("7 batches", "locked, while the DNIs learn; nothing is updated from them")
    assert said["unlock"] == (
        "auto",
        "a stage unlocks at cosine 0.3 between its gradients, locks again below 0.1; every 20th batch is looked at",
    )


def test_a_line_for_a_switch() -> None:
    assert switch_line(Switched(1, 1240, False, 0.623, 0.4123, 0)) == (
        "stage 1 unlocked at batch 1,240 (cosine 0.62, norm ratio 0.41)"
    )
    assert switch_line(Switched(0, 9, True, -0.1, 31.0, 0, replica=2)) == (
        "replica 2, stage 0 locked again at batch 9 (cosine -0.10, norm ratio 31)"
    )


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (Plan(mode="naive", warmup_steps=3), "warmup_steps has no effect with mode naive: leave it out, or choose"),
        (Plan(mode="local", unlock="auto"), "unlock has no effect with mode local: leave it out, or choose"),
        (Plan(stages=1, unlock="auto"), "unlock has no effect with 1 stage, which has no DNI: leave it out."),
        (Plan(unlock_cosine=0.5), "unlock_cosine has no effect without unlock auto: leave it out, or add unlock auto."),
        (Plan(unlock="auto", deterministic=True), "unlock auto decides by what is measured, and deterministic runs"),
        (Plan(warmup_steps=-1), "warmup_steps is -1: it must be a whole number, at least 0."),
        (Plan(unlock="auto", unlock_cosine=2.0), r"unlock_cosine is 2\.0: it must lie in \(0, 1\]\."),
        (Plan(unlock="sometimes"), "unlock"),  # type: ignore[arg-type]
        (Plan(warmup_steps=3, update_probability=0.5), "warmup_steps and update_probability do not go together"),
        (Plan(warmup_steps=3, emulate="stage_ms=1"), "warmup_steps has no effect with emulate"),
    ],
)
def test_what_cannot_be_is_refused(plan: Plan, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        check_plan(plan)
