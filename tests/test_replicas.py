"""Replicated pipelines: locked ones equal one process on all their batches, unlocked ones average weights by and by."""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import problems
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from safetensors.torch import load_file
from torch import Tensor, nn

from launch import Result, RunFailed, train
from launch.bench.compare import run_bench
from launch.bench.global_batch import global_batch_recipe
from launch.options.options import BenchOptions
from launch.recipes.digits import digits
from launch.show.console import Console
from pipeline import OptimizerPlan, Plan, PlanError, Recipe, correct_predictions, run_reference
from pipeline.data.recipe import build_model
from pipeline.errors import StageError
from pipeline.messages.message import Message
from pipeline.metrics.spans import Span, silent
from pipeline.plan.check import check_plan
from pipeline.plan.replica_layout import plan_of
from pipeline.replicas.all_gather import AllGather
from pipeline.replicas.averaging import WeightAverager
from pipeline.run.reference import Reference
from pipeline.schedule.policies import Action
from pipeline.seeding import seed_layer
from pipeline.stage.evaluation import scores_of
from workers.supervision.stall import Progress
from workers.telemetry.status_table import Status

STEPS = 12
SPLITS = {1: (8,), 2: (3, 5)}


def in_float64() -> nn.Sequential:
    """Eight layers whose loss is a mean over rows, in float64: sums in another order differ in the last digits only."""
    w = problems.WIDTH
    layers = nn.Linear(w, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(16, problems.CLASSES)).double()


def batch_in_float64(index: int) -> tuple[Tensor, Tensor]:
    inputs, labels = problems.batch(index)
    return inputs.double(), labels


def recipe() -> Recipe:
    return Recipe(name="replicas", model=in_float64, batches=batch_in_float64, loss=F.cross_entropy)


def _alone(replicas: int, optimizer: OptimizerPlan) -> tuple[dict[str, Tensor], list[float]]:
    """One process, no pipeline, on the batches of a step put together."""
    model = build_model(recipe(), 0)
    rule = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer.rule](model.parameters(), lr=optimizer.lr)
    losses = []
    for step in range(STEPS):
        batches = [batch_in_float64(step * replicas + replica) for replica in range(replicas)]
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        rule.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        rule.step()
        losses.append(loss.item())
    return dict(model.state_dict()), losses


def _plan(stages: int, replicas: int, mode: str = "naive", **more: Any) -> Plan:
    settings: dict[str, Any] = {"steps": STEPS, "sizes": SPLITS[stages], **more}
    return Plan(mode=mode, stages=stages, replicas=replicas, **settings)


def _assert_equals_one_process(mine: Reference | Result, replicas: int, optimizer: OptimizerPlan) -> None:
    truth, losses = _alone(replicas, optimizer)
    assert mine.state_tensors().keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(mine.state_tensors()[name], tensor, rtol=1e-9, atol=1e-11)
    assert mine.losses == pytest.approx(losses, rel=1e-10)


def _train(plan: Plan, runs: Path, **more: Any) -> Result:
    parts: dict[str, Any] = {"model": in_float64, "batches": batch_in_float64, "loss": F.cross_entropy}
    return train(**{**parts, **more}, plan=plan, runs=runs, quiet=True)


# ---------------------------------------------------------------- locked: gradients, exactly


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("mode", ["naive", "gpipe", "1f1b"])
def test_locked_replicas_equal_one_process_on_all_their_batches(mode: str, stages: int, replicas: int) -> None:
    """Every parameter, after 12 steps of Adam, to nine digits of sixteen: what another order of summing leaves."""
    optimizer = OptimizerPlan(rule="adam", lr=1e-2)
    parts = 1 if mode == "naive" else 4
    mine = run_reference(recipe(), _plan(stages, replicas, mode, optimizer=optimizer, microbatches=parts))
    _assert_equals_one_process(mine, replicas, optimizer)
    for other in mine.others:
        assert_same({n: t.detach() for s in other for n, t in s.state_tensors().items()}, mine.state_tensors())


@pytest.mark.processes
@pytest.mark.parametrize(("stages", "replicas", "mode"), [(1, 3, "naive"), (2, 2, "naive"), (2, 2, "1f1b")])
def test_locked_processes_equal_the_reference_driver_bit_for_bit(
    stages: int, replicas: int, mode: str, tmp_path: Path
) -> None:
    parts = 1 if mode == "naive" else 2
    plan = _plan(stages, replicas, mode, microbatches=parts)
    result, truth = _train(plan, tmp_path), run_reference(recipe(), plan)
    assert_same(result.state_tensors(), truth.state_tensors())
    assert_same(result.optimizer_tensors(), truth.optimizer_tensors())
    assert result.losses == truth.losses
    _assert_equals_one_process(result, replicas, plan.optimizer)


@pytest.mark.processes
def test_locked_replicas_that_end_early_end_after_the_same_step(tmp_path: Path) -> None:
    """The wish to end reaches one replica before the other; what was trained is the beginning of the whole run."""
    plan = _plan(2, 2, steps=100_000, until="loss=1.4", evaluate_every=5)
    result = _train(plan, tmp_path, evaluation=held_out_in_float64)
    assert result.met is not None
    assert result.steps < 100_000
    assert {done.updated for done in result.finished.values()} == {result.steps}
    truth = run_reference(recipe(), _plan(2, 2, steps=result.steps))
    assert_same(result.state_tensors(), truth.state_tensors())


def held_out_in_float64() -> Iterator[tuple[Tensor, Tensor]]:
    for inputs, labels in problems.held_out():
        yield inputs.double(), labels


def test_the_locked_reference_driver_ends_early_after_the_same_step_in_all_replicas() -> None:
    more = {"steps": 100, "until": "loss=1.4", "evaluate_every": 5}
    mine = run_reference(replace(recipe(), evaluation=held_out_in_float64), _plan(2, 3, **more))
    assert mine.reached is not None
    assert 0 < mine.reached <= len(mine.losses) < 100
    whole = run_reference(recipe(), _plan(2, 3, steps=len(mine.losses)))
    assert_same(mine.state_tensors(), whole.state_tensors())


def test_what_is_random_in_a_layer_differs_between_replicas_and_running_statistics_are_replica_0s() -> None:
    """Dropout and BatchNorm: two replicas equal one process that adds up the gradients of their two batches."""
    plan = Plan(mode="naive", stages=2, sizes=(4, 4), replicas=2, steps=STEPS)
    mine = run_reference(problems.recipe(), plan)
    models = [build_model(problems.recipe(), 0) for _ in range(2)]
    optimizers = [torch.optim.Adam(model.parameters(), lr=plan.optimizer.lr, fused=True) for model in models]
    for step in range(STEPS):
        for replica, model in enumerate(models):
            optimizers[replica].zero_grad()
            x, labels = problems.batch(2 * step + replica)
            for index, layer in enumerate(model):
                seed_layer(plan_of(plan, replica).seed, index, step)
                x = layer(x)
            F.cross_entropy(x, labels).backward()
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = other.grad = (one.grad + other.grad) / 2
        for optimizer in optimizers:
            optimizer.step()
    assert_same(mine.state_tensors(), dict(models[0].state_dict()))
    means = [state["1.running_mean"] for state in (mine.state_tensors(), models[1].state_dict())]
    assert not torch.equal(*means)


# ---------------------------------------------------------------- not locked: weights, off the critical path


class Line(deque[Message]):
    """A queue without any delay."""

    def room(self) -> bool:
        return True

    def put(self, message: Message) -> None:
        self.append(message)

    def take(self) -> Message | None:
        return self.popleft() if self else None


def _pair(every: int) -> tuple[list[nn.Linear], list[WeightAverager]]:
    """Two replicas of a weight and a running statistic: (1, 10) and (5, 30)."""
    layers = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    lines = {(0, 1): Line(), (1, 0): Line()}
    averagers = []
    for replica, (layer, values) in enumerate(zip(layers, ((1.0, 10.0), (5.0, 30.0)), strict=True)):
        layer.register_buffer("statistic", torch.tensor([values[1]]))
        layer.register_buffer("count", torch.tensor([replica]))
        layer.weight.data.fill_(values[0])
        other = 1 - replica
        exchange = AllGather(0, replica, {other: lines[replica, other]}, {other: lines[other, replica]})
        averagers.append(WeightAverager(layer.state_dict(keep_vars=True), exchange, bool, silent, every))
    return layers, averagers


def _step(layer: nn.Linear, averager: WeightAverager, update: float) -> None:
    layer.weight.data += update
    averager.after_step()
    averager.poll()


def test_an_average_is_a_correction_that_keeps_what_was_learned_meanwhile() -> None:
    (one, other), (first, second) = _pair(every=2)
    _step(one, first, 1.0)
    assert not first._exchange.open, "nothing is due after one of two steps"
    _step(one, first, 1.0)  # snapshot: 3
    _step(one, first, 0.25)
    assert not first.ready
    assert not first.held, "nobody waits"
    _step(other, second, -2.0)
    _step(other, second, 4.0)  # snapshot: 7, so the mean is 5
    first.poll()
    assert first.ready
    assert second.ready
    assert first.take() is False
    second.take()
    assert one.weight.item() == 3.25 + (5 - 3)
    assert other.weight.item() == 7 + (5 - 7)
    assert (one.statistic.item(), other.statistic.item()) == (10, 30), "statistics are the replicas' own on the way"


def test_a_round_that_is_late_puts_off_the_next_snapshot() -> None:
    """Two snapshots before the first correction would carry the same difference twice."""
    (one, other), (first, second) = _pair(every=1)
    _step(one, first, 1.0)  # snapshot: 2
    _step(one, first, 1.0)  # due again, but the first round is open
    _step(other, second, 1.0)  # snapshot: 6, the mean is 4
    first.poll()
    first.take()
    second.take()
    assert one.weight.item() == 3 + (4 - 2)
    assert other.weight.item() == 6 + (4 - 6)
    _step(one, first, 1.0)  # snapshot: 6
    _step(other, second, 0.0)  # snapshot: 4, the mean is 5
    first.poll()
    first.take()
    second.take()
    assert (one.weight.item(), other.weight.item()) == (6 + (5 - 6), 4 + (5 - 4))


def test_at_the_end_everybody_waits_for_the_mean_of_the_last_weights_and_statistics() -> None:
    (one, other), (first, second) = _pair(every=1)
    _step(one, first, 1.0)  # a round that the other replica, which ends before, never joins
    second.after_training()
    _step(one, first, 1.0)
    assert not first.ready
    first.after_training()
    second.poll()
    first.poll()
    assert first.held
    assert second.held
    first.take()
    second.take()
    assert (one.weight.item(), other.weight.item()) == (4, 4), "the mean of 3 and 5"
    assert (one.statistic.item(), other.statistic.item()) == (20, 20)
    assert (one.count.item(), other.count.item()) == (0, 1), "a count is no mean"
    assert not first.held


@pytest.mark.parametrize("mode", ["unlocked", "local", "async-1f1b"])
@pytest.mark.parametrize("hop_steps", [0.0, 2.5])
def test_unlocked_replicas_end_with_the_same_weights(mode: str, hop_steps: float) -> None:
    """Whatever is on its way when the last batch is through; and evaluation sees those weights."""
    plan = Plan(
        mode=mode,
        stages=3,
        sizes=(3, 3, 2),
        replicas=3,
        steps=21,
        average_every=2,
        hop_steps=hop_steps,
        evaluate_every=5,
    )
    mine = run_reference(problems.recipe(), plan)
    counts = {name for name in mine.state_tensors() if name.endswith("num_batches_tracked")}
    for other in mine.others:
        theirs = {n: t.detach() for s in other for n, t in s.state_tensors().items()}
        assert_same({n: t for n, t in theirs.items() if n not in counts}, _without(mine.state_tensors(), counts))
    assert len(mine.losses) == 21
    assert [updates for updates, _ in mine.scores] == [5, 10, 15, 20, 21]
    model = build_model(problems.recipe(), 0)
    model.load_state_dict(mine.state_tensors())
    assert scores_of(problems.recipe(), model).loss() == pytest.approx(mine.scores[-1][1].loss(), rel=1e-6)
    taken = [event for event in mine.events if event.action is Action.AVERAGE]
    assert len(taken) > 2 * plan.workers, "averages were taken on the way, not only at the end"


def _without(tensors: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.processes
@pytest.mark.parametrize("targets", ["bootstrap", "true"])
def test_deterministic_replicas_of_processes_equal_the_reference_driver_bit_for_bit(
    targets: str, tmp_path: Path
) -> None:
    plan = Plan(
        stages=3,
        sizes=(3, 3, 2),
        replicas=2,
        steps=25,
        average_every=3,
        targets=targets,
        deterministic=True,
        hop_steps=1.5,
        evaluate_every=10,
    )
    truth = run_reference(problems.recipe(), plan)
    mine = _train(
        plan, tmp_path, model=problems.dropout_and_batch_norm, batches=problems.batch, evaluation=problems.held_out
    )
    assert_same(mine.state_tensors(), truth.state_tensors())
    assert_same(mine.optimizer_tensors(), truth.optimizer_tensors())
    assert mine.losses == truth.losses
    assert [scored.loss for scored in mine.scores] == [scores.loss() for _, scores in truth.scores]


def test_two_unlocked_replicas_learn_digits() -> None:
    mine = run_reference(digits(hidden=128), Plan(stages=2, replicas=2, steps=120))
    accuracy = mine.scores[-1][1].accuracy()
    assert accuracy is not None
    assert accuracy > 0.9


# ---------------------------------------------------------------- processes


class Refuses(nn.Module):
    """An identity that comes to grief when all rows that it is trained on are the same."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.equal(x, x[:1].expand_as(x)):
            if self.number:
                os.kill(os.getpid(), self.number)
            raise ZeroDivisionError("as planned")
        return x


def refusing(number: int) -> nn.Sequential:
    """Split 2 | 3, stage 1 begins with the layer that refuses."""
    w = problems.WIDTH
    return nn.Sequential(nn.Linear(w, w), nn.Tanh(), Refuses(number), nn.Tanh(), nn.Linear(w, problems.CLASSES))


def batch_11_is_bad(index: int) -> tuple[Tensor, Tensor]:
    inputs, labels = problems.batch(index)
    return (torch.zeros_like(inputs) if index == 11 else inputs), labels


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["naive", "unlocked"])
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (0, "replica 1, stage 1, layer 2, batch 5: ZeroDivisionError: as planned"),
        (signal.SIGKILL, r"replica 1, stage 1 \(pid \d+\) was killed by SIGKILL, forward of batch 5"),
        (signal.SIGSTOP, r"no progress for 3.0 s: replica 1, stage 1 \(pid \d+\) is in forward batch 5"),
    ],
)
def test_trouble_in_one_replica_ends_all(mode: str, number: int, says: str, tmp_path: Path) -> None:
    """Only replica 1 sees batch 11, as its batch 5. Unlocked, the others wait for it at their end, but not for ever."""
    stall_after_s = 3.0 if number == signal.SIGSTOP else 60.0
    plan = Plan(mode=mode, stages=2, sizes=(2, 3), replicas=2, steps=200, stall_after_s=stall_after_s)
    with pytest.raises(RunFailed, match=says) as caught:
        _train(plan, tmp_path, model=partial(refusing, int(number)), batches=batch_11_is_bad)
    assert (caught.value.stage, caught.value.batch) == (1, 5)


class Told:
    """A board on which nobody but the test writes: (span, progress) of every worker."""

    def __init__(self, *workers: tuple[Span, int]) -> None:
        self.workers = list(workers)

    def read(self, worker: int) -> Status:
        span, progress = self.workers[worker]
        return Status(span, 0, 0, progress)


def test_a_replica_that_waits_for_another_is_not_stuck_one_that_does_not_is() -> None:
    """Two replicas of two stages; five seconds of patience, on a clock of the test's own."""
    with mock.patch("workers.supervision.stall.time") as clock:
        clock.monotonic.return_value = 0.0
        board = Told((Span.FORWARD, 1), (Span.FORWARD, 1), (Span.FORWARD, 1), (Span.FORWARD, 1))
        progress = Progress(board.read, Plan(stages=2, replicas=2), patience_s=5.0)
        everybody = {0, 1, 2, 3}

        board.workers[0], board.workers[2] = (Span.HELD, 1), (Span.FORWARD, 2)
        clock.monotonic.return_value = 6.0
        assert not progress.stalled((), everybody), "replica 0 waits for replica 1, which goes on"
        board.workers[2] = (Span.FORWARD, 3)
        clock.monotonic.return_value = 7.0
        board.workers[0] = (Span.WAIT, 1)
        assert progress.stalled((), everybody), "replica 0 waits for nobody and has done nothing for 7 s"
        assert not progress.stalled((), {2, 3}), "it is done"
        assert not progress.stalled((0,), everybody), "it has just said something"
        board.workers[0] = (Span.HELD, 1)
        clock.monotonic.return_value = 13.0
        assert progress.stalled((), everybody), "nobody has done anything since"


@pytest.fixture(scope="module")
def unlocked_run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Two replicas of two stages, over gloo and with a link's delay, which take each average when it comes."""
    plan = Plan(stages=2, sizes=(4, 4), replicas=2, steps=40, average_every=4, channels="gloo", link="latency_ms=1")
    parts: dict[str, Any] = {"model": problems.dropout_and_batch_norm, "batches": problems.batch}
    more = {"evaluation": problems.held_out, "correct": correct_predictions}
    return _train(plan, tmp_path_factory.mktemp("runs"), **parts, **more)


@pytest.mark.processes
def test_the_result_counts_what_all_replicas_did(unlocked_run: Result) -> None:
    result = unlocked_run
    assert (result.steps, result.samples) == (40, 40 * 2 * problems.ROWS)
    assert [(done.replica, done.stage) for _, done in sorted(result.finished.items())] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    told = json.loads((result.run_dir / "result.json").read_text())
    assert (told["replicas"], told["samples"], told["steps"]) == (2, result.samples, 40)
    assert told["samples_per_s"] > 0
    metrics = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in metrics if line["event"] == "train"][-1] == result.samples
    assert "16 in each of 2 replicas" in result.summary()


@pytest.mark.processes
def test_every_worker_of_every_replica_is_measured(unlocked_run: Result) -> None:
    measured = unlocked_run.measured
    assert measured is not None
    assert (len(measured.stages), measured.batches) == (4, 2 * (40 - unlocked_run.resolved.warmup))
    for spans, stage in zip(unlocked_run.spans, measured.stages, strict=True):
        assert spans.seconds(Span.AVERAGE) > 0
        assert sum(stage.shares.values()) == pytest.approx(1.0, abs=1e-6)
    assert unlocked_run.samples_per_s == pytest.approx(measured.samples_per_s(problems.ROWS), rel=0.05)


@pytest.mark.processes
def test_what_is_exported_is_what_was_evaluated(unlocked_run: Result, tmp_path: Path) -> None:
    model = build_model(problems.recipe(), 99)
    model.load_state_dict(load_file(unlocked_run.export(tmp_path / "model.safetensors")), strict=True)
    assert scores_of(problems.recipe(), model).loss() == pytest.approx(unlocked_run.loss, rel=1e-6)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(replicas=0), "replicas is 0: it must be a whole number, at least 1"),
        (Plan(replicas=2, average_every=0), "average_every is 0: it must be a whole number, at least 1"),
        (Plan(average_every=3), "average_every has no effect without replicas"),
        (Plan(mode="gpipe", replicas=2, average_every=3), "average_every has no effect with mode gpipe"),
    ],
)
def test_plans_that_make_no_sense(plan: Plan, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        check_plan(plan)


def test_a_model_that_differs_from_process_to_process_is_refused() -> None:
    """Shares of other shapes: said with both shapes, not added up."""
    there, back = Line(), Line()
    one, other = AllGather(3, 0, {1: there}, {1: back}), AllGather(3, 1, {0: back}, {0: there})
    one.offer((torch.zeros(4),))
    with pytest.raises(
        StageError, match=r"stage 3: replica 1 expected share 0 .*torch.Size\(\[5\]\).* from replica 0, got"
    ):
        other.offer((torch.zeros(5),))


# ---------------------------------------------------------------- benchmarks


@pytest.mark.processes
def test_a_benchmark_compares_with_one_process_on_the_batches_of_a_step_together(tmp_path: Path) -> None:
    """The same samples and as many updates in every row: the exact ones end with the same loss."""
    plan = Plan(stages=2, sizes=(3, 5), replicas=2, steps=6)
    options = BenchOptions(runs=tmp_path, rows=("backprop", "naive", "unlocked"), rounds=1, quality=False)
    report = run_bench(recipe, plan, options, ["test"], Console(quiet=True)).as_dict()
    single, naive, unlocked = report["rows"]
    assert [(row["stages"], row["replicas"]) for row in report["rows"]] == [(1, 1), (2, 2), (2, 2)]
    assert naive["loss"] == pytest.approx(single["loss"], rel=1e-9)
    assert unlocked["loss"] != pytest.approx(single["loss"], rel=1e-9)
    assert len(naive["busy_share"]) == 4
    assert "Unlocked, 2 stages, 2 replicas:" in report["verdict"]


def test_joined_batches_are_drawn_as_the_replicas_draw_them() -> None:
    """From the seeds of their own numbers, not from that of the step."""
    source = replace(recipe(), batches=random_batch)
    plan = Plan(replicas=3, seed=7)
    inputs, labels = global_batch_recipe(lambda: source, plan).seeded_batch(7, 2)
    mine = [source.seeded_batch(7, number) for number in (6, 7, 8)]
    assert torch.equal(inputs, torch.cat([one for one, _ in mine]))
    assert torch.equal(labels, torch.cat([one for _, one in mine]))
    assert not torch.equal(mine[0][0], mine[1][0])


def random_batch(index: int) -> tuple[Tensor, Tensor]:
    return torch.randn(4, problems.WIDTH), torch.randint(problems.CLASSES, (4,))
