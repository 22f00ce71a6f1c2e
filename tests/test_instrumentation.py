"""Runs that record no spans: the same training, its speed, and where a failure happened."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import problems
import pytest
import torch.nn.functional as F
from oracle import assert_same
from test_cli import freewheel

from launch import Result, RunFailed, train
from launch.bench.cost_ledger import seconds_of
from pipeline import Plan
from pipeline.metrics.spans import Span
from workers.telemetry.span_recorder import Pulse
from workers.telemetry.status_table import StatusTable


def _train(plan: Plan, runs: Path) -> Result:
    return train(
        model=problems.dropout_and_batch_norm,
        batches=problems.batch,
        loss=F.cross_entropy,
        evaluation=problems.held_out,
        plan=plan,
        runs=runs,
        quiet=True,
    )


# ---------------------------------------------------------------- a run without spans


@pytest.fixture
def board() -> Iterator[StatusTable]:
    """A board of two stages."""
    name = f"fw-test-{id(object())}"
    with contextlib.closing(StatusTable(name, 2, create=True)) as made:
        StatusTable.unlink_name(name)
        yield made


def test_a_pulse_tells_the_board_what_a_stall_is_explained_with(board: StatusTable) -> None:
    pulse = Pulse(1, board)
    progress = []
    for span in (Span.LOAD, Span.FORWARD, Span.SEND, Span.DNI, Span.BACKWARD, Span.STEP, Span.OTHER, Span.WAIT):
        pulse(span, 7)
        progress.append(board.progress())
    assert progress == [0, 1, 1, 1, 2, 2, 2, 2]
    status = board.read(1)
    assert (status.span, status.batch) == (Span.WAIT, 7)
    assert 0 <= status.age_s() < 60
    assert board.read(0).progress == 0


@pytest.mark.processes
def test_a_run_without_spans_trains_the_same_and_measures_its_speed_only(tmp_path: Path) -> None:
    plan = Plan(stages=3, sizes=(3, 3, 2), steps=20, deterministic=True)
    full = _train(plan, tmp_path)
    bare = _train(Plan(**{**vars(plan), "spans": False}), tmp_path)
    assert_same(bare.state_tensors(), full.state_tensors())
    assert bare.losses == full.losses
    assert not (bare.run_dir / "spans").exists()
    assert (bare.spans, bare.measured) == ([], None)
    for result in (full, bare):
        assert result.samples_per_s is not None
        assert result.samples_per_s > 18 * problems.ROWS / result.seconds, "warm-up and evaluation do not count"
        assert f"{result.samples_per_s:,.0f} samples/s" in result.summary()


@pytest.mark.processes
def test_the_speed_of_a_run_is_that_of_its_spans(tmp_path: Path) -> None:
    """Two clock readings in the last stage give what the spans of all stages give."""
    result = _train(Plan(stages=2, sizes=(4, 4), steps=40), tmp_path)
    assert result.measured is not None
    assert result.samples_per_s == pytest.approx(result.measured.samples_per_s(problems.ROWS), rel=0.05)
    work = seconds_of(result.measured, problems.ROWS)
    assert work.total == pytest.approx(2 / result.measured.samples_per_s(problems.ROWS), rel=1e-6)


@pytest.mark.processes
def test_a_run_of_one_batch_has_no_speed(tmp_path: Path) -> None:
    result = _train(Plan(stages=2, sizes=(4, 4), steps=1), tmp_path)
    assert (result.samples_per_s, result.measured) == (None, None)


@pytest.mark.processes
def test_a_failure_without_spans_is_still_located(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="stage 1, layer 5, batch 5: ZeroDivisionError: as planned") as failed:
        train(
            model=problems.failing,
            batches=problems.batch,
            loss=F.cross_entropy,
            plan=Plan(stages=2, sizes=(2, 4), steps=20, mode="naive", spans=False),
            runs=tmp_path,
            quiet=True,
        )
    assert (failed.value.stage, failed.value.batch) == (1, 5)


def test_a_benchmark_needs_the_spans() -> None:
    refusals = freewheel("bench", "digits", "--spans").refusals
    assert refusals == ["freewheel: spans has no effect in freewheel bench, which chooses it: leave it out."]


def test_what_is_suggested_after_a_run_without_spans_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    from launch import cli

    command, _ = cli._after_training("digits", ["--no-spans", "--stages", "3"], Plan(spans=False), steps=9)
    assert command == "freewheel bench digits --stages 3"


def test_output_of_help_names_the_option() -> None:
    assert "--no-spans" in freewheel("train", "digits", "--help").out
    with contextlib.redirect_stdout(io.StringIO()):
        assert "--no-spans" not in freewheel("bench", "digits", "--help").out
