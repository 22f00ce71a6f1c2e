"""A stage that is saved after any batch, and loaded into one that was built anew, goes on bit for bit.

Three stages are driven by hand: forward, predict, backward, step, learn. After every batch their states are taken; from
each of them others, whose weights were drawn at random before, train the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import DNIPlan, OptimizerPlan, Plan, StageError
from pipeline.data.network import stage_layers
from pipeline.messages.bundle import Bundle, Item
from pipeline.replicas.all_gather import AllGather
from pipeline.replicas.averaging import Averager, averager_of
from pipeline.run.resolve import resolve
from pipeline.schedule.modes import MODES
from pipeline.seeding import seeded
from pipeline.stage.divergence import Guard
from pipeline.stage.dni_quality import Quality
from pipeline.stage.stage import Stage
from pipeline.stage.unlock import Lock, Switch
from pipeline.state import load_module, module_state
from tests import problems
from tests.oracle import assert_same_state, flat
from tests.test_replicas import Line

BATCHES, SIZES = 8, (3, 3, 2)
RECIPE = problems.recipe()


@dataclass
class Chain:
    """All stages of a plan, one batch after the other.

    Attributes:
        seen: what every batch gave: its loss, and the stages that locked or unlocked.
    """

    plan: Plan
    seen: dict[int, tuple[float, list[Switch | None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        resolved = resolve(RECIPE, self.plan)
        self.plan, cuts = resolved.plan, [None, *resolved.cuts, None]
        predicts = MODES[self.plan.mode].gradient != "true"
        self.stages = [
            Stage(stage_layers(RECIPE, self.plan, k), k, self.plan, RECIPE, cuts[k + 1] if predicts else None, cuts[k])
            for k in range(self.plan.stages)
        ]

    def state(self) -> list[Any]:
        return [stage.state() for stage in self.stages]

    def load(self, states: list[Any]) -> None:
        """Into stages that begin with other weights than all others."""
        for stage, state in zip(self.stages, states, strict=True):
            with torch.no_grad():
                for tensor in stage.state_tensors().values():
                    tensor.copy_(torch.rand_like(tensor.float()).to(tensor.dtype))
            stage.load_state(state)

    def train(self, batch: int) -> None:
        """Forward of every part, upwards; then the updates, downwards; then what DNIs learn, downwards."""
        items = [Item(batch, part) for part in range(self.plan.microbatches)]
        inputs, labels = RECIPE.batch(batch)
        parts = zip(inputs.chunk(len(items)), labels.chunk(len(items)), strict=True)
        for item, (x, y) in zip(items, parts, strict=True):
            self._forward(item, (x,), (y,))
        switches = [stage.switched() for stage in self.stages]
        sent: dict[Item, Bundle | None] = {}
        for stage in reversed(self.stages):
            arrived, sent = sent, {}
            for item in items:
                sent[item] = self._update(stage, item, arrived.get(item))
            stage.step(batch)
            if (target := arrived.get(Item(batch))) is not None and Item(batch) in stage.in_flight and not stage.last:
                relayed = stage.learn(Item(batch), target)
                sent[Item(batch)] = relayed if relayed is not None else sent[Item(batch)]
        self._judge(batch)
        self.seen[batch] = (self.stages[-1].loss_of(batch), switches)
        assert not any(stage.in_flight for stage in self.stages), "a state is taken with nothing in flight"

    def _forward(self, item: Item, x: Bundle, context: Bundle) -> None:
        awaited = False
        for stage in self.stages:
            x = stage.forward(item, x, context, awaited=awaited)
            awaited = stage.in_flight.of(item).route.locked
            if awaited:
                stage.predict(item)

    def _update(self, stage: Stage, item: Item, arrived: Bundle | None) -> Bundle | None:
        waits = MODES[self.plan.mode].gradient == "true" or stage.in_flight.of(item).route.locked
        return stage.backward(item, arrived if waits and not stage.last else stage.predict(item))

    def _judge(self, batch: int) -> None:
        gradient = self.stages[-1].true_gradient()
        for stage in reversed(self.stages[:-1]):
            if gradient is not None:
                _, gradient = stage.judge(batch, gradient)


def unlocked(form: str = "loss_model", **options: Any) -> dict[str, Any]:
    return {"mode": "unlocked", "dni": DNIPlan(form=form, every=1), **options}


def adam(**options: Any) -> OptimizerPlan:
    return OptimizerPlan(**{"lr": 0.01, **options})


CASES: dict[str, dict[str, Any]] = {
    "naive": {"mode": "naive"},
    "gpipe": {"mode": "gpipe", "microbatches": 4},
    "1f1b": {"mode": "1f1b", "microbatches": 2},
    "async-1f1b": {"mode": "async-1f1b"},
    "local": {"mode": "local"},
    **{form: unlocked(form) for form in ("loss_model", "label_residual", "linear", "mlp")},
    **{targets: unlocked(targets=targets) for targets in ("true", "mixed")},
    "targets of every second batch": unlocked(targets="true") | {"dni": DNIPlan(form="linear", every=2, rows=0.5)},
    "warm-up of the DNIs": unlocked(warmup_steps=4),
    "auto": unlocked("linear", unlock="auto", unlock_cosine=0.01, quality_every=1),
    "not judged by guards": unlocked(guard=False),
    "sgd": {"mode": "naive", "optimizer": adam(rule="sgd")},
    "momentum": unlocked(optimizer=adam(rule="sgd", momentum=0.9)),
    "adamw": {"mode": "naive", "optimizer": adam(rule="adamw", weight_decay=0.1)},
    "nadamw": {"mode": "naive", "optimizer": adam(rule="nadamw")},
    "cosine": {"mode": "naive", "optimizer": adam(schedule="cosine", warmup_steps=3)},
    "linear, clipped": unlocked(optimizer=adam(schedule="linear", clip=0.01)),
}


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest) -> tuple[Plan, Chain, list[list[Any]]]:
    """A plan, its run, and the states after every batch."""
    plan = Plan(stages=3, sizes=SIZES, steps=BATCHES, seed=5, **CASES[request.param])
    chain, states = Chain(plan), []
    for batch in range(BATCHES):
        chain.train(batch)
        states.append(chain.state())
    if plan.unlock == "auto" or plan.warmup_steps:
        assert any(any(switches) for _, switches in chain.seen.values()), "something turns in this run"
    return plan, chain, states


def test_from_every_batch_on_it_goes_on_bit_for_bit(run: tuple[Plan, Chain, list[list[Any]]]) -> None:
    plan, truth, states = run
    for saved in range(BATCHES):
        again = Chain(plan)
        again.load(states[saved])
        assert_same_state(again.state(), states[saved])
        for batch in range(saved + 1, BATCHES):
            again.train(batch)
            assert again.seen[batch] == truth.seen[batch], f"saved after batch {saved}, in batch {batch}"
        assert_same_state(again.state(), truth.state())


def test_a_state_holds_nothing_but_plain_values(run: tuple[Plan, Chain, list[list[Any]]]) -> None:
    """So that it can be written, sent, and read by another version of the code."""
    *_, states = run
    for state in states:
        assert set(map(type, _nodes(state))) <= {dict, list, Tensor, int, float, bool, str, type(None)}
        assert all(
            tensor.is_leaf and not tensor.requires_grad for tensor in _nodes(state) if isinstance(tensor, Tensor)
        )


def test_a_state_is_a_copy_that_training_does_not_change(run: tuple[Plan, Chain, list[list[Any]]]) -> None:
    plan, truth, states = run
    again = Chain(plan)
    again.load(states[0])
    for batch in range(1, BATCHES):
        again.train(batch)
    pointers = {t.data_ptr() for t in _nodes(states[0]) if isinstance(t, Tensor) and t.numel()}
    assert not pointers & {t.data_ptr() for stage in again.stages for t in stage.state_tensors().values()}
    assert_same_state(again.state(), truth.state())


def test_everything_that_trains_is_in_it() -> None:
    """Running means of a BatchNorm, moments of both optimizers, sigma, the place in the schedule."""
    chain = Chain(Plan(stages=3, sizes=SIZES, steps=4, optimizer=adam(schedule="cosine"), **unlocked("mlp")))
    for batch in range(2):
        chain.train(batch)
    leaves = flat(chain.state())
    for name in ("running_mean", "exp_avg", "exp_avg_sq", "mean_square", "num_targets", "num_steps", "first_losses"):
        assert any(name in leaf for leaf in leaves), name


# ---------------------------------------------------------------- parts that remember longer


def _fresh_guard() -> Guard:
    return Guard(Plan(dni=DNIPlan(form="linear")), 0, [])


def _losses(guard: Guard, batch: int) -> None:
    guard.loss(batch, 1.0 if batch < 25 else 5.0 * (batch - 20))


def _gradients(guard: Guard, batch: int) -> None:
    guard.true_gradient(batch, (torch.full((8, 6), 1e-6 if batch < 5 else 1e-3 if batch < 30 else 50.0),))


def _silence(guard: Guard, batch: int) -> None:
    _target(guard, batch, 1.0 if batch < 100 else 0.0)


def _errors(guard: Guard, batch: int) -> None:
    _target(guard, batch, -3.0 if batch > 300 else 1.0)


class _Predicts:
    """A DNI that gives the target times a factor."""

    form = None

    def __init__(self, times: float) -> None:
        self._times = times

    def predict(self, h: Tensor, labels: Tensor) -> Tensor:
        return self._times * h


def _target(guard: Guard, batch: int, times: float) -> None:
    dni: Any = _Predicts(times)
    h = F.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(batch)))
    guard.target(batch, dni, h, torch.zeros(8, dtype=torch.int64), h)


@pytest.mark.parametrize("watch", [_losses, _gradients, _silence, _errors])
def test_a_guard_remembers_what_the_run_began_with(watch: Any) -> None:
    """Else a run that was taken up while it ran away would be measured against that."""

    def go_on(guard: Guard, first: int, states: list[Any]) -> None:
        for batch in range(first, 2000):
            states.append(guard.state())
            watch(guard, batch)

    states: list[Any] = []
    with pytest.raises(StageError) as truth:
        go_on(_fresh_guard(), 0, states)
    assert len(states) > 20
    for first in range(0, len(states), max(1, len(states) // 40)):
        again = _fresh_guard()
        again.load_state(states[first])
        with pytest.raises(StageError) as caught:
            go_on(again, first, [])
        assert str(caught.value) == str(truth.value)


def test_a_lock_remembers_its_samples() -> None:
    plan = Plan(unlock="auto", unlock_cosine=0.5, quality_every=1)
    cosines = [0.1, 0.6, 0.9, 0.9, 0.2, -0.5, 0.0, -0.5, 0.9, 0.9, 0.9]

    def go_on(lock: Lock, first: int) -> Iterator[tuple[Any, Switch | None]]:
        for batch in range(first, len(cosines)):
            state = lock.state()
            lock.decide(batch)
            yield state, lock.switched()
            lock.judged(Quality(batch, cosines[batch], 1.0, 0.5))

    truth = list(go_on(Lock(plan, 0), 0))
    assert sum(switch is not None for _, switch in truth) == 2
    for first, (state, _) in enumerate(truth):
        again = Lock(plan, 0)
        again.load_state(state)
        assert [switch for _, switch in go_on(again, first)] == [switch for _, switch in truth[first:]]


# ---------------------------------------------------------------- replicas


def _replicas(mode: str) -> tuple[list[nn.Linear], list[Averager]]:
    """Two replicas of a layer, at different weights, that average without any delay."""
    plan = Plan(mode=mode, replicas=2, average_every=3)
    lines = {(0, 1): Line(), (1, 0): Line()}
    layers, averagers = [], list[Averager]()
    for replica in range(2):
        with seeded(replica, "replica"):
            layers.append(nn.Linear(2, 2))
        other = 1 - replica
        exchange = AllGather(0, replica, {other: lines[replica, other]}, {other: lines[other, replica]})
        averagers.append(averager_of(plan, layers[-1].state_dict(keep_vars=True), exchange))
    return layers, averagers


def _one_step(layers: list[nn.Linear], averagers: list[Averager], step: int) -> None:
    for replica, (layer, averager) in enumerate(zip(layers, averagers, strict=True)):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) * (replica + 1))
        averager.before_step()
    _average(averagers)
    for layer, averager in zip(layers, averagers, strict=True):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= parameter.grad  # type: ignore[operator]
        averager.after_step()
    _average(averagers)


def _average(averagers: list[Averager]) -> None:
    for averager in averagers:
        averager.poll()
    for averager in averagers:
        averager.poll()
        if averager.ready:
            averager.take()


@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_replicas_go_on_with_the_rounds_of_their_averages(mode: str) -> None:
    """Gradients are averaged in every step, weights in every third: who forgets the step averages at another one."""
    layers, averagers = _replicas(mode)
    states = []
    for step in range(8):
        states.append(([module_state(layer) for layer in layers], [averager.state() for averager in averagers]))
        _one_step(layers, averagers, step)
    truth = [module_state(layer) for layer in layers]
    for first, (weights, remembered) in enumerate(states):
        assert set(map(type, _nodes(remembered))) <= {dict, list, int, type(None)}
        layers, averagers = _replicas(mode)
        for layer, averager, weight, state in zip(layers, averagers, weights, remembered, strict=True):
            load_module(layer, weight)
            averager.load_state(state)
        for step in range(first, 8):
            _one_step(layers, averagers, step)
        assert_same_state([module_state(layer) for layer in layers], truth)


def test_a_round_that_was_open_is_begun_again() -> None:
    """The share of a replica that was saved while it waited is lost with its channel: the snapshot is due anew."""
    _, (averager, _) = _replicas("unlocked")
    for _ in range(3):
        averager.after_step()
    state = averager.state()
    _, (loaded, other) = _replicas("unlocked")
    loaded.load_state(state)
    other.load_state(state)
    for each in (loaded, other):
        each.after_step()
    for each in (loaded, other):
        each.poll()
    assert loaded.ready


# ---------------------------------------------------------------- helpers


def _nodes(state: Any) -> Iterator[Any]:
    """A tree and everything in it."""
    yield state
    if isinstance(state, dict | list):
        for child in state.values() if isinstance(state, dict) else state:
            yield from _nodes(child)
