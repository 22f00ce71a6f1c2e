"""Messages that come in another order than their batches did, twice, or not at all; channels without room."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import train
from pipeline import ChannelPlan, DNIPlan, Plan, PlanError, run_reference
from pipeline.data.network import stage_layers
from pipeline.errors import StageError
from pipeline.messages.bundle import Bundle, Item
from pipeline.messages.message import Kind, Message
from pipeline.plan.check import check_plan
from pipeline.plan.topology import edges_of
from pipeline.run.hollow_stage import HollowStage
from pipeline.run.reference import Costs, Reference
from pipeline.run.resolve import resolve
from pipeline.run.runner import Runner
from pipeline.run.virtual_time import VirtualClock, VirtualQueue
from pipeline.schedule.policies import Action, unlocked
from pipeline.stage.stage import Stage
from pipeline.stage.unlock import Lock
from tests import problems
from tests.oracle import assert_same, train_alone

SIZES = (2, 3, 3)
LINEAR = DNIPlan(form="linear", every=1)


def _stage(index: int, **options: Any) -> Stage:
    """One stage of three."""
    recipe = problems.recipe()
    resolved = resolve(recipe, Plan(stages=3, sizes=SIZES, dni=LINEAR, **options))
    cut = replace(resolved.cuts[index], loss=recipe.loss)
    return Stage(stage_layers(recipe, resolved.plan, index), index, resolved.plan, recipe, cut)


def _updated(stage: Stage, batch: int) -> Bundle:
    """A batch that the stage has updated from; gives its output."""
    x, labels = problems.batch(batch)
    h = stage.forward(Item(batch), (x if stage.index == 0 else torch.randn(len(x), 24),), (labels,))
    stage.backward(Item(batch), stage.predict(Item(batch)))
    stage.step(batch)
    return h


# ---------------------------------------------------------------- a stage


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("targets", ["true", "mixed"])
def test_targets_may_come_in_any_order(targets: str, order: tuple[int, ...]) -> None:
    """Once a story: the target of a batch deleted what was kept of all older ones, and theirs was a KeyError."""
    stage = _stage(1, targets=targets)
    outputs = [_updated(stage, batch) for batch in range(3)]
    for left, batch in enumerate(order):
        assert stage.in_flight.relaying() == sorted(order[left:])
        assert stage.learn(Item(batch), outputs[batch]) is not None
        assert Item(batch) not in stage.in_flight


def test_what_is_kept_for_targets_that_were_dropped_goes() -> None:
    stage = _stage(1, targets="true")
    outputs = [_updated(stage, batch) for batch in range(4)]
    stage.in_flight.forget(before=2)
    assert stage.in_flight.relaying() == [2, 3]
    with pytest.raises(StageError, match=r"stage 1, batch 0: .* came twice, or too late"):
        stage.learn(Item(0), outputs[0])


def test_what_comes_twice_or_too_late_names_stage_and_batch() -> None:
    stage = _stage(1, quality_every=2)
    output = _updated(stage, 1)
    stage.learn(Item(1), output)
    stage.judge(1, output)
    with pytest.raises(StageError, match=r"stage 1, batch 1: .* came twice, or too late"):
        stage.learn(Item(1), output)
    with pytest.raises(StageError, match=r"stage 1, batch 1: .* came twice, or too late"):
        stage.judge(1, output)
    for of_no_batch in (stage.backward, stage.learn):
        with pytest.raises(StageError, match="stage 1, batch 9"):
            of_no_batch(Item(9), output)
    with pytest.raises(StageError, match="stage 1, batch 9"):
        stage.judge(9, output)


# ---------------------------------------------------------------- runs in which cuts lock and unlock


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Which batches' targets each stage learned from, in order."""
    seen: dict[int, list[int]] = defaultdict(list)
    learn = Stage.learn

    def listened(self: Stage, item: Item, gradient: Bundle) -> Bundle | None:
        seen[self.index].append(item.batch)
        return learn(self, item, gradient)

    monkeypatch.setattr(Stage, "learn", listened)
    return seen


def _run_locked(
    monkeypatch: pytest.MonkeyPatch, script: dict[int, str], late: dict[str, int], **plan: Any
) -> Reference:
    """Stage k is locked where its script, repeated, says L; a channel is so many ticks late."""

    def decide(self: Lock, batch: int) -> bool:
        return script.get(self._stage, "U")[batch % len(script.get(self._stage, "U"))] == "L"

    monkeypatch.setattr(Lock, "decide", decide)
    whole = Plan(stages=3, sizes=SIZES, steps=24, dni=LINEAR, unlock="auto", quality_every=3, **plan)
    return run_reference(problems.recipe(), whole, Costs(late=lambda channel, batch: late.get(channel, 0)))


def _out_of_order(batches: list[int]) -> bool:
    return batches != sorted(batches)


@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
@pytest.mark.parametrize(
    ("script", "slow", "overtaken"),
    [
        ({}, "", False),
        ({0: "UUUL"}, "gradients 2->1", True),  # batch 3 waits for stage 1 alone, which relays 0 to 2 later
        ({0: "UUUL"}, "gradients 1->0", False),
        ({0: "LU", 1: "UUUL"}, "gradients 2->1", True),
        ({0: "UUL", 1: "UULU"}, "activations 1->2", True),
    ],
    ids=["never locked", "lower cut", "lower cut, in order", "both", "both, slow above"],
)
def test_a_cut_that_locks_again_loses_no_target(
    targets: str,
    script: dict[int, str],
    slow: str,
    overtaken: bool,
    learned: dict[int, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once a story: stage 0 locked again, got the gradient of batch b + 1 and then died of that of b."""
    result = _run_locked(monkeypatch, script, {slow: 17}, targets=targets)
    assert [sorted(learned[k]) for k in range(2)] == [[*range(24)]] * 2
    if slow != "gradients 1->0" and targets != "bootstrap":
        assert _out_of_order(learned[0]) is overtaken, learned[0]
    assert [list(stage.in_flight) for stage in result.stages] == [[], [], []]
    assert [[q.batch for q in result.qualities[k]] for k in range(2)] == [[*range(2, 24, 3)]] * 2


@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
def test_dropped_targets_leave_nothing_behind_while_cuts_lock(
    targets: str, learned: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slot, and a channel that carries a message in six steps: most targets are dropped, what is awaited is not."""
    late = {"gradients 1->0": 18, "gradients 2->1": 18}
    script = {0: "UUUUUUUULU", 1: "UUUUUUUUUUUL"}
    result = _run_locked(monkeypatch, script, late, targets=targets, channel=ChannelPlan(gradient_slots=1))
    for stage in result.stages[:2]:
        awaited = {b for b in range(24) if script[stage.index][b % len(script[stage.index])] == "L"}
        assert awaited <= set(learned[stage.index]) < set(range(24))
        assert len(stage.in_flight) <= 1


# ---------------------------------------------------------------- channels without room


def _runner(awaited: bool) -> tuple[Runner, VirtualQueue]:
    """The last of two stages, with three batches before it and one slot to send a gradient in."""
    plan = Plan(stages=2, steps=3, warmup_steps=3 if awaited else 0)
    inlet, outlet = (VirtualQueue(VirtualClock(), capacity, 0, None) for capacity in (9, 1))
    for batch in range(3):
        kind = Kind.AWAITED if awaited else Kind.ACTIVATION
        inlet.put(Message(kind, Item(batch), 0, (torch.empty(0),), (torch.empty(0),)))
    down, up = edges_of(plan)
    return Runner(HollowStage(1, plan), unlocked, {down: inlet}, {up: outlet}, stages=2), outlet


@pytest.mark.parametrize("awaited", [False, True])
def test_of_gradients_without_room_targets_alone_are_dropped(awaited: bool) -> None:
    runner, outlet = _runner(awaited)
    for action in [Action.FORWARD, Action.UPDATE] * 3:
        runner.poll()
        assert runner.next() is action
        runner.perform(action)
    come = []
    while (message := outlet.take()) is not None:
        come.append((message.kind, message.batch))
        runner.poll()
    sent = [(Kind.GRADIENT, batch) for batch in range(3)]
    assert come == (sent if awaited else [sent[0], sent[2], (Kind.DROPPED, 2)])
    assert runner.dropped == (0 if awaited else 1)


@pytest.mark.parametrize("mode", ["naive", "gpipe", "1f1b", "async-1f1b", "unlocked"])
@pytest.mark.parametrize("hop", [0.0, 3.0])
def test_a_gradient_that_a_stage_waits_for_is_never_dropped(mode: str, hop: float) -> None:
    """Once a story: gpipe with one gradient slot expected the gradient of batch 0.2 and got that of batch 0.5."""
    parts = {"microbatches": 8} if mode in ("gpipe", "1f1b") else {}
    warm = {"warmup_steps": 6} if mode == "unlocked" else {}
    plan = Plan(mode=mode, stages=3, sizes=SIZES, steps=6, hop_steps=hop, **parts, **warm)
    narrow, wide = (
        run_reference(problems.recipe(), replace(plan, channel=channel))
        for channel in (ChannelPlan(slots=1, gradient_slots=1), ChannelPlan())
    )
    assert_same(narrow.state_tensors(), wide.state_tensors())
    assert narrow.losses == wide.losses


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_processes_do_not_drop_it_either(tmp_path: Path) -> None:
    channel = ChannelPlan(slots=1, gradient_slots=1)
    plan = Plan(mode="gpipe", microbatches=8, stages=3, sizes=SIZES, steps=6, channel=channel)
    recipe = problems.recipe()
    result = train(model=recipe.model, batches=recipe.batches, loss=recipe.loss, plan=plan, runs=tmp_path, quiet=True)
    model, _, losses = train_alone(recipe, plan)
    assert_same(result.state_tensors(), dict(model.state_dict()))
    assert result.losses == losses
    assert [record.dropped for record in result.finished.values()] == [0, 0, 0]


def test_gradient_slots_are_refused_where_nothing_reads_them() -> None:
    channel = ChannelPlan(gradient_slots=2)
    check_plan(Plan(mode="naive", channel=channel))
    for plan in (Plan(mode="local", channel=channel), Plan(mode="naive", stages=1, channel=channel)):
        with pytest.raises(PlanError, match=r"^channel.gradient_slots has no effect with [^\n]*$"):
            check_plan(plan)


# ---------------------------------------------------------------- twice, or not at all


@pytest.mark.parametrize(
    ("mode", "kind", "times"),
    [
        *((mode, Kind.ACTIVATION, 2) for mode in ("naive", "async-1f1b", "unlocked", "local")),
        *((mode, Kind.ACTIVATION, 0) for mode in ("async-1f1b", "unlocked")),  # naive waits: the stall report's
        *((mode, Kind.GRADIENT, 2) for mode in ("naive", "async-1f1b", "unlocked")),
        ("async-1f1b", Kind.GRADIENT, 0),
        ("unlocked", Kind.SAMPLE, 2),
    ],
)
def test_a_message_that_comes_twice_or_never_ends_the_run_by_name(
    mode: str, kind: Kind, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = VirtualQueue.put

    def put_often(self: VirtualQueue, message: Message) -> None:
        for _ in range(times if (message.kind, message.batch) == (kind, 5) else 1):
            put(self, message)

    monkeypatch.setattr(VirtualQueue, "put", put_often)
    measured = {"quality_every": 3, "dni": LINEAR, "targets": "true"} if mode == "unlocked" else {}
    with pytest.raises(StageError, match=r"^stage \d, batch [56]: ") as caught:
        run_reference(problems.recipe(), Plan(mode=mode, stages=3, sizes=SIZES, steps=8, **measured))
    assert kind.name.lower().replace("sample", "sampled batch") in str(caught.value)


def test_an_end_before_the_last_gradient_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the last batch would be left out without a word."""
    put = VirtualQueue.put

    def put_but_one(self: VirtualQueue, message: Message) -> None:
        if (message.kind, message.batch) != (Kind.GRADIENT, 7):
            put(self, message)

    monkeypatch.setattr(VirtualQueue, "put", put_but_one)
    with pytest.raises(StageError, match=r"^stage 0, batch 7: the END came from stage 1 before the gradient"):
        run_reference(problems.recipe(), Plan(mode="async-1f1b", stages=2, sizes=(4, 4), steps=8))
