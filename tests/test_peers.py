"""The rivals train what we train: their weights equal a single process's, and their failures end them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import parent_process
from pathlib import Path

import problems
import pytest
import torch
from oracle import train_alone
from safetensors.torch import load_file
from torch import Tensor, nn

from launch.bench.rivals import TORCH_SCHEDULES, RivalRun, best_microbatches, run_ddp, run_torch_schedule
from launch.bench.rivals.placement import place
from launch.setup.resolve_source import resolve_source
from pipeline import Plan, PlanError, Recipe, correct_predictions
from pipeline.run.resolved import Resolved
from workers.errors import RunFailed

STEPS, WITHIN_S = 5, 60.0
TOLERANCE = 1e-5  # sums in another order, five steps of Adam: 2e-6 seen


def with_relu() -> nn.Sequential:
    """Eight layers; a second stage of 3 | 5 begins with one that writes to its input."""
    pairs = [(nn.Linear(problems.WIDTH, problems.WIDTH), nn.ReLU(inplace=True)) for _ in range(3)]
    head = (nn.Linear(problems.WIDTH, 24), nn.Linear(24, problems.CLASSES))
    return nn.Sequential(*(layer for pair in pairs for layer in pair), *head)


def recipe(model: Callable[[], nn.Module] = with_relu) -> Recipe:
    """A classifier without dropout and BatchNorm, with held-out data."""
    return Recipe(
        name="peers",
        model=model,
        batches=problems.batch,
        loss=nn.functional.cross_entropy,
        evaluation=problems.held_out,
        correct=correct_predictions,
        steps=STEPS,
    )


class Sleeps(nn.Module):
    """An identity that never comes back from training."""

    def forward(self, x: Tensor) -> Tensor:
        """Sleep."""
        if self.training and parent_process() is not None:  # where the layers are tried out first it comes back
            time.sleep(600)
        return x


def sleeping() -> nn.Sequential:
    """The second stage of 2 | 2 sleeps."""
    return nn.Sequential(nn.Linear(problems.WIDTH, 8), nn.Linear(8, 8), Sleeps(), nn.Linear(8, problems.CLASSES))


def _resolved(source: Callable[[], Recipe], **options: object) -> Resolved:
    plan = Plan(mode="naive", stages=2, **{"steps": STEPS, "balance": "layers", **options})  # type: ignore[arg-type]
    return resolve_source(source, plan)


@torch.no_grad()
def _held_out(model: nn.Module) -> tuple[float, float]:
    """Loss and accuracy, row by row."""
    model.eval()
    inputs, labels = (torch.cat(tensors) for tensors in zip(*problems.held_out(), strict=True))
    output = model(inputs)
    return float(recipe().loss(output, labels)), float((output.argmax(1) == labels).float().mean())


def _assert_equals_training_alone(run: RivalRun, weights: Path, resolved: Resolved) -> None:
    model, _, losses = train_alone(recipe(), resolved.plan)
    truth, mine = model.state_dict(), load_file(weights)
    assert mine.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=TOLERANCE)
    assert (run.loss, run.accuracy) == pytest.approx(_held_out(model), abs=TOLERANCE)
    assert run.last_loss == pytest.approx(losses[-1], abs=TOLERANCE)
    assert (run.batches, len(run.peak_memory_bytes)) == (STEPS - 1, 2)
    assert run.seconds > 0
    assert min(run.peak_memory_bytes) > 1e7


@pytest.mark.processes
def test_ddp_equals_training_alone(tmp_path: Path) -> None:
    resolved, weights = _resolved(recipe), tmp_path / "weights"
    run = run_ddp(recipe, resolved, ranks=2, threads=1, warmup=1, within_s=WITHIN_S, weights=weights)
    _assert_equals_training_alone(run, weights, resolved)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("schedule", "microbatches"),
    [
        ("GPipe", 1),
        ("GPipe", 4),
        ("1F1B", 4),
        ("Interleaved1F1B", 4),
        ("InterleavedZeroBubble", 4),
        ("ZBVZeroBubble", 1),
        ("ZBVZeroBubble", 4),
    ],
)
def test_torch_schedules_equal_training_alone(schedule: str, microbatches: int, tmp_path: Path) -> None:
    resolved, weights = _resolved(recipe, sizes=(3, 5), balance="time"), tmp_path / "weights"
    run = run_torch_schedule(
        recipe,
        resolved,
        schedule,
        microbatches=microbatches,
        threads=1,
        warmup=1,
        within_s=WITHIN_S,
        weights=weights,
    )
    _assert_equals_training_alone(run, weights, resolved)


@pytest.mark.processes
def test_the_fastest_number_of_microbatches_is_chosen() -> None:
    source = partial(problems.wide_recipe, 4, 32, 12)
    tried = best_microbatches(source, _resolved(source), "1F1B", threads=1)
    assert tried.keys() == {2, 4}, "1 is too few for 1F1B on two ranks, 8 does not divide 12 rows"
    assert min(tried.values()) > 0


# ---------------------------------------------------------------- failures (conftest looks for what is left behind)


def _fails(call: Callable[[], object]) -> RunFailed:
    begin = time.monotonic()
    with pytest.raises(RunFailed) as caught:
        call()
    assert time.monotonic() - begin < WITHIN_S - 10
    return caught.value


@pytest.mark.processes
@pytest.mark.parametrize("schedule", TORCH_SCHEDULES)
def test_a_failing_model_gives_one_clear_error(schedule: str, capfd: pytest.CaptureFixture[str]) -> None:
    source = partial(recipe, problems.failing)
    resolved = _resolved(source, steps=1000, sizes=(2, 4), balance="time")
    run = partial(run_torch_schedule, source, resolved, schedule, microbatches=2, threads=1, warmup=1)
    failure = _fails(partial(run, within_s=WITHIN_S))
    rank = 0 if TORCH_SCHEDULES[schedule].v else 1
    assert str(failure) == f"torch's {schedule}: rank {rank} of 2 failed: ZeroDivisionError: as planned"
    assert failure.details.startswith("Traceback")
    assert 'raise ZeroDivisionError("as planned")' in failure.details
    assert capfd.readouterr() == ("", ""), "torch's own report of an error is its whole schedule"


@pytest.mark.processes
def test_a_failing_model_under_ddp() -> None:
    source = partial(recipe, problems.failing)
    run = partial(run_ddp, source, _resolved(source, steps=1000), ranks=2, threads=1, warmup=1)
    failure = _fails(partial(run, within_s=WITHIN_S))
    assert str(failure).startswith("DDP: rank ")
    assert str(failure).endswith(" of 2 failed: ZeroDivisionError: as planned")
    assert 'raise ZeroDivisionError("as planned")' in failure.details


@pytest.mark.processes
def test_the_rank_that_was_killed_is_named_not_the_one_that_noticed() -> None:
    source = partial(recipe, partial(problems.suicidal, int(signal.SIGKILL)))
    resolved = _resolved(source, steps=1000, sizes=(2, 2), balance="time")
    run = partial(run_torch_schedule, source, resolved, "GPipe", microbatches=2)
    failure = _fails(partial(run, threads=1, warmup=1, within_s=WITHIN_S))
    assert str(failure) == "torch's GPipe: rank 1 of 2 was killed by SIGKILL"


@pytest.mark.processes
def test_a_rank_that_hangs_meets_the_deadline() -> None:
    source = partial(recipe, sleeping)
    run = partial(run_torch_schedule, source, _resolved(source), "GPipe", microbatches=1, threads=1, warmup=1)
    assert "torch's GPipe did not end within 2 s" in str(_fails(partial(run, within_s=2.0)))


# ---------------------------------------------------------------- refused before a process starts


def test_rows_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(PlanError, match="3 ranks for batches of 16 rows"):
        run_ddp(recipe, _resolved(recipe), ranks=3, threads=1, warmup=1)


@pytest.mark.parametrize(
    ("schedule", "microbatches", "options", "message"),
    [
        ("GPip", 1, {}, "unknown schedule 'GPip'; did you mean 'GPipe'"),
        ("GPipe", 3, {}, "3 microbatches for batches of 16 rows"),
        ("1F1B", 1, {}, "1 microbatches on 2 ranks: 1F1B needs as many microbatches as ranks"),
        ("GPipe", 2, {"warmup": STEPS}, "warmup is 5 for 5 steps"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused(
    schedule: str, microbatches: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        run_torch_schedule(
            recipe, _resolved(recipe), schedule, microbatches=microbatches, threads=1, **{"warmup": 1, **options}
        )


def test_too_few_layers_are_refused() -> None:
    source = partial(recipe, problems.two_linear)
    with pytest.raises(PlanError, match="ZBVZeroBubble on 2 ranks needs 4 layers, and the model has 2"):
        run_torch_schedule(source, _resolved(source), "ZBVZeroBubble", microbatches=2, threads=1, warmup=1)


# ---------------------------------------------------------------- placement


def test_virtual_stages_are_balanced_by_measured_time_and_placed_in_a_loop_or_a_v() -> None:
    """A ReLU stays with the layer before it: four places where a stage can begin."""
    resolved = replace(_resolved(recipe), layer_seconds=(3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    loop, v = (place(recipe(), resolved, name, 4) for name in ("Interleaved1F1B", "ZBVZeroBubble"))
    assert (loop.sizes, loop.ranks, loop.owners) == ((2, 2, 2, 2), (0, 1, 0, 1), [0, 0, 1, 1, 0, 0, 1, 1])
    assert (v.ranks, v.owners) == ((0, 1, 1, 0), [0, 0, 1, 1, 1, 1, 0, 0])
    assert [edge.shape for edge in v.edges] == [(4, 12), (4, 12), (4, 12), (4, 12), (4, 5)]


def test_without_measured_time_layers_count_alike_and_one_stage_per_rank_is_the_runs_own() -> None:
    resolved = _resolved(recipe, sizes=(3, 5), balance="time")
    assert place(recipe(), resolved, "InterleavedZeroBubble", 4).sizes == (2, 2, 2, 2)
    assert place(recipe(), resolved, "1F1B", 4).sizes == (3, 5)
