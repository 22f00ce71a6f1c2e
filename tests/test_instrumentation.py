"""What measuring costs: runs without spans, the statistics of pairs, and the benchmark that compares the two."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from math import comb
from pathlib import Path

import problems
import pytest
import torch.nn.functional as F
from oracle import assert_same
from test_cli import freewheel

from launch import Result, RunFailed, train
from launch.bench.cost_ledger import seconds_of
from launch.bench.span_cost import cost_by_count, cost_of_spans, median_interval, record_s
from pipeline import Plan
from pipeline.metrics.measurements import Measured, StageMeasured
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


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(("n", "k"), [(5, None), (6, 1), (8, 1), (9, 2), (10, 2), (25, 8), (100, 40)])
def test_the_interval_of_the_median_is_that_of_the_sign_test(n: int, k: int | None) -> None:
    """Tables of the sign test (two-sided, 5 %): the k-th smallest to the k-th largest value."""
    values = [float(value) for value in range(n, 0, -1)]
    assert median_interval(values) == (None if k is None else (float(k), float(n + 1 - k)))


@pytest.mark.parametrize("n", range(6, 60))
def test_the_interval_is_the_shortest_that_is_wrong_in_5_percent_at_most(n: int) -> None:
    interval = median_interval([float(value) for value in range(1, n + 1)])
    assert interval is not None
    k = int(interval[0])

    def wrong(rank: int) -> float:
        return 2 * sum(comb(n, heads) for heads in range(rank)) / 2**n

    assert wrong(k) <= 0.05 < wrong(k + 1)


def test_the_cost_is_the_time_that_spans_add() -> None:
    assert cost_of_spans([100.0, 50.0, 80.0], [102.0, 50.5, 84.0]) == (
        "Instrumentation costs 2.0 % (1.0 to 5.0; smallest and largest of 3 pairs)."
    )
    bare = [100.0 + share for share in (0, 1, 2, 3, 4, 5)]
    assert cost_of_spans([100.0] * 6, bare) == ("Instrumentation costs 2.5 % (0.0 to 5.0; 95 % confidence, 6 pairs).")


def test_the_cost_by_count_is_that_of_the_busiest_recorder() -> None:
    """10 batches in 2 s: 300 records of 2 us are 0.6 ms of it."""
    stages = tuple(StageMeasured({}, None, None, None, None, records) for records in (300, 80))
    assert cost_by_count(Measured(batches=10, seconds=2.0, stages=stages), 2e-6) == (
        "Counted, it is 0.03 %: up to 30 records a batch, 2.0 us each."
    )


def test_what_one_record_takes_is_measured_on_a_real_recorder() -> None:
    assert 1e-8 < record_s(rounds=3, records=20_000) < 1e-3, "more records than one piece of memory holds"


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


# ---------------------------------------------------------------- the benchmark of pairs


@pytest.mark.processes
def test_pairs_say_what_instrumentation_costs(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = f"--steps 6 --pairs 2 --layers 2 --hidden 64 --balance layers --runs {tmp_path / 'runs'} --json {file}"
    ended = freewheel("bench", "digits", *options.split())
    assert ended.status == 0, ended.err
    bench = json.loads(file.read_text())
    assert bench["verdict"].startswith("Instrumentation costs ")
    assert "smallest and largest of 2 pairs). Counted, it is " in bench["verdict"]
    assert bench["instrumentation"] == bench["verdict"]
    assert ended.out.count("Instrumentation costs") == 1
    full, bare = bench["rows"]
    assert (full["mode"], full["spans"], bare["mode"], bare["spans"]) == ("unlocked", True, "unlocked", False)
    assert full["busy_share"] is not None
    for name in ("update_latency_s", "gradient_age_updates", "busy_share", "bubble_share", "dni_share"):
        assert bare[name] is None, "there are no spans to tell"
    assert bare["ledger"]["forward_s"] is None
    assert bare["ledger"]["forward_flop"] == full["ledger"]["forward_flop"] > 0
    assert bare["peak_memory_bytes"][1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pairs 0", "pairs is 0: it must be at least 1."),
        ("--pairs 3 --rows naive", "rows has no effect with pairs: leave one of them out."),
        ("--pairs 3 --rounds 2", "rounds has no effect with pairs: leave one of them out."),
        ("--spans", "spans has no effect in freewheel bench, which chooses it: leave it out."),
    ],
)
def test_options_that_do_not_go_together(options: str, message: str) -> None:
    assert freewheel("bench", "digits", *options.split()).refusals == [f"freewheel: {message}"]


def test_what_is_suggested_after_a_run_without_spans_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    from launch import cli

    command, _ = cli._after_training("digits", ["--no-spans", "--stages", "3"], Plan(spans=False), steps=9)
    assert command == "freewheel bench digits --stages 3"


def test_output_of_help_names_the_option() -> None:
    assert "--no-spans" in freewheel("train", "digits", "--help").out
    with contextlib.redirect_stdout(io.StringIO()):
        assert "--no-spans" not in freewheel("bench", "digits", "--help").out
