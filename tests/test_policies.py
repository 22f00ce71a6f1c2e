"""What each policy does next, as diagrams: time runs to the right, one line per stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from pipeline import DNIPlan, Plan
from pipeline.data.loader import phantom_inputs
from pipeline.run.hollow_stage import HollowStage
from pipeline.run.reference import Costs, Event, _drive, schedule, timeline
from pipeline.schedule.policies import Action, View, naive, scripted, unlocked


def diagram(plan: Plan, costs: Costs, phantoms: Sequence[HollowStage] = ()) -> list[str]:
    """Which action of which batch each stage does at each tick, with costs of one tick."""
    assert plan.steps is not None
    phantoms = phantoms or [HollowStage(k, plan) for k in range(plan.stages)]
    events = _drive([phantoms], plan, lambda replica, enough: phantom_inputs(plan, plan.steps, 0), costs, None)
    shown = [event for event in events if event.batch < plan.steps * plan.microbatches and event.end > event.start]
    width = max(event.end for event in shown)
    lines = []
    for k in range(plan.stages):
        cells = ["."] * width
        for event in (event for event in shown if event.stage == k):
            cells[event.start] = _cell(event)
        lines.append(" ".join(f"{cell:<2}" for cell in cells).rstrip(" ."))
    return lines


def _cell(event: Event) -> str:
    return f"{event.action.value}{event.batch}"


def test_naive_keeps_one_batch_in_the_pipeline() -> None:
    plan = Plan(mode="naive", stages=3, steps=2)
    assert diagram(plan, Costs(forward=1, backward=1)) == [
        "F0 .  .  .  .  B0 F1 .  .  .  .  B1",
        ".  F0 .  .  B0 .  .  F1 .  .  B1",
        ".  .  F0 B0 .  .  .  .  F1 B1",
    ]


def test_unlocked_never_waits_for_a_gradient() -> None:
    plan = Plan(mode="unlocked", stages=3, steps=4)
    assert diagram(plan, Costs(forward=1, backward=1)) == [
        "F0 U0 F1 U1 F2 U2 F3 U3",
        ".  F0 U0 F1 U1 F2 U2 F3 U3",
        ".  .  F0 U0 F1 U1 F2 U2 F3 U3",
    ]


def test_async_1f1b_waits_for_slow_hops_or_keeps_more_batches_open() -> None:
    """A hop of two steps: a batch is back at stage 0 of three after two stages up and four hops, ten steps."""
    waiting, full = (
        [event for event in timeline(plan, 0, Costs()) if event.stage == 0 and event.batch < 60]
        for plan in (
            Plan(mode="async-1f1b", stages=3, steps=60, hop_steps=2.0, in_flight=in_flight)
            for in_flight in ("stages", "full")
        )
    )
    ahead = [[event.action for event in events].index(Action.BACKWARD) for events in (waiting, full)]
    assert ahead == [3, 11]
    first, last = 11, max(index for index, event in enumerate(full) if event.action is Action.FORWARD)
    assert all(before.end == after.start for before, after in itertools.pairwise(full[first : last + 1])), "no gap"
    ends = [max(event.end for event in events) for events in (waiting, full)]
    assert ends[0] > 3 * ends[1]


def test_gpipe_forwards_all_microbatches_then_backwards_all() -> None:
    plan = Plan(mode="gpipe", stages=3, steps=1, microbatches=4)
    assert diagram(plan, Costs(forward=1, backward=1)) == [
        "F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3",
        ".  F0 F1 F2 F3 .  .  B0 B1 B2 B3",
        ".  .  F0 F1 F2 F3 B0 B1 B2 B3",
    ]


def test_1f1b_keeps_no_more_than_one_microbatch_open_per_stage_above_and_itself() -> None:
    plan = Plan(mode="1f1b", stages=3, steps=1, microbatches=4)
    assert diagram(plan, Costs(forward=1, backward=1)) == [
        "F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3",
        ".  F0 F1 .  B0 F2 B1 F3 B2 .  B3",
        ".  .  F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_async_1f1b_goes_on_without_a_flush() -> None:
    plan = Plan(mode="async-1f1b", stages=3, steps=5)
    assert diagram(plan, Costs(forward=1, backward=1)) == [
        "F0 F1 F2 .  .  B0 F3 B1 F4 B2 .  B3 .  B4",
        ".  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 .  B4",
        ".  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]


@pytest.mark.parametrize(
    ("view", "action"),
    [
        (View(activation=True), Action.FORWARD),
        (View(activation=True, room=False), Action.WAIT),
        (View(), Action.WAIT),
        (View(forwarded=1), Action.WAIT),
        (View(forwarded=1, activation=True), Action.WAIT),
        (View(forwarded=1, gradient=True), Action.BACKWARD),
        (View(forwarded=1, stages_above=0), Action.BACKWARD),
    ],
    ids=str,
)
def test_naive(view: View, action: Action) -> None:
    assert naive(view) is action


@pytest.mark.parametrize(
    ("view", "action"),
    [
        (View(forwarded=1), Action.UPDATE),
        (View(forwarded=1, gradient=True, activation=True), Action.UPDATE),
        (View(forwarded=1, backwarded=1, gradient=True, activation=True), Action.LEARN),
        (View(forwarded=1, backwarded=1, activation=True), Action.FORWARD),
        (View(forwarded=1, backwarded=1, activation=True, room=False), Action.WAIT),
        (View(forwarded=1, backwarded=1), Action.WAIT),
    ],
    ids=str,
)
def test_unlocked(view: View, action: Action) -> None:
    assert unlocked(view) is action


def test_scripted_waits_for_what_its_next_action_needs() -> None:
    policy = scripted([Action.FORWARD, Action.UPDATE, Action.LEARN])
    assert policy(View(gradient=True)) is Action.WAIT
    assert policy(View(activation=True)) is Action.FORWARD
    assert policy(View(actions=1, forwarded=1, activation=True)) is Action.UPDATE
    assert policy(View(actions=2, forwarded=1, backwarded=1, activation=True)) is Action.WAIT
    assert policy(View(actions=2, forwarded=1, backwarded=1, gradient=True)) is Action.LEARN
    assert policy(View(actions=3, activation=True)) is Action.WAIT


@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_every_target_that_flows_is_learned_exactly_once(targets: str, stages: int) -> None:
    plan = Plan(stages=stages, steps=12, targets=targets)
    for k, order in enumerate(schedule(plan, held_out_batches=0)):
        assert order.count(Action.UPDATE) == 12
        assert order.count(Action.LEARN) == (12 if k < stages - 1 else 0)


def test_dni_every_lets_one_gradient_in_n_flow() -> None:
    plan = Plan(stages=3, steps=12, targets="true", dni=DNIPlan(every=4))
    learned = [order.count(Action.LEARN) for order in schedule(plan, held_out_batches=0)]
    assert learned == [3, 3, 0]


@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
def test_a_dni_that_wants_few_targets_is_sent_few(targets: str) -> None:
    plan = Plan(stages=3, steps=12, targets=targets, dni=DNIPlan(every=5))
    learned = [order.count(Action.LEARN) for order in schedule(plan, held_out_batches=0)]
    assert learned == [3, 3, 0], "batches 0, 5 and 10"
