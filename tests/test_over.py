"""A comparison over the number of stages and over the latency of a link: real workers, emulated stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.bench.report import Report
from launch.bench.scaling import AXES, ScalingReport, axis_of, bench_over, mode_name
from launch.options.options import BenchOptions, parse
from launch.plots.curves import curves_of
from launch.show.console import Console
from pipeline import Plan, PlanError

ROWS, HIDDEN = 8, 16
H_BYTES, LABEL_BYTES = ROWS * HIDDEN * 4, ROWS * 8
STAGES, LATENCY = AXES
TYPED = f"--layers 4 --hidden {HIDDEN} --batch {ROWS} --emulate stage_ms=2,dni_ms=0.2 --steps 8 --rounds 2"


def _sweep(runs: Path, typed: str) -> ScalingReport:
    arguments = [*TYPED.split(), *typed.split(), "--runs", str(runs), "--name", "sweep"]
    parsed = parse("mlp", arguments, BenchOptions, "freewheel bench")
    return bench_over(parsed.source, parsed.plan, parsed.run, ["freewheel"], Console(quiet=True))


@pytest.fixture(scope="module")
def over_stages(tmp_path_factory: pytest.TempPathFactory) -> ScalingReport:
    """Two stages, and also 1 and 4."""
    return _sweep(tmp_path_factory.mktemp("over"), "--over-stages 4 1 --rows naive 1f1b local unlocked")


@pytest.fixture(scope="module")
def over_latency(tmp_path_factory: pytest.TempPathFactory) -> ScalingReport:
    """A link of 5 ms, and also none and 20 ms."""
    return _sweep(
        tmp_path_factory.mktemp("over"),
        "--link latency_ms=5,bandwidth_mbps=1000 --over-latency-ms 0 20 --rows naive unlocked",
    )


def _row(point: dict[str, Any], mode: str) -> dict[str, Any]:
    (row,) = (row for row in point["rows"] if row["mode"] == mode)
    return dict(row)


@pytest.mark.processes
def test_bench_json_has_a_point_for_every_number_of_stages(over_stages: ScalingReport) -> None:
    content = json.loads(json.dumps(over_stages.as_dict()))
    points = content["over_stages"]
    assert content["over_latency_ms"] is None
    assert [point["stages"] for point in points] == [1, 2, 4], "the plan's own among them, in order"
    for point in points:
        assert [row["mode"] for row in point["rows"]] == ["naive", "1f1b", "local", "unlocked"]
        for row in point["rows"]:
            assert (row["stages"], len(row["busy_share"]), row["emulated"]) == (point["stages"], point["stages"], True)
            assert row["update_latency_s"]["p99"] >= row["update_latency_s"]["p50"] > 0
            assert row["samples_per_s"]["max"] >= row["samples_per_s"]["min"] > 0
    assert content["rows"] == points[1]["rows"], "the main table is that of the plan's own two stages"
    assert _row(points[2], "naive")["update_latency_s"]["p50"] > 3e-3, "waits for three stages of 2 ms above it"
    assert _row(points[0], "unlocked")["gradient_age_updates"] is None, "a single stage gets no gradient from above"


@pytest.mark.processes
def test_bytes_per_batch_are_those_of_the_tensors(over_stages: ScalingReport) -> None:
    """Activation and labels go down, a gradient as large as the activation goes up, unlocked for every fourth batch; a
    local loss sends none."""
    down = H_BYTES + LABEL_BYTES
    for point in over_stages.as_dict()["over_stages"]:
        cuts = point["stages"] - 1
        for row in point["rows"]:
            up = {"local": 0, "unlocked": H_BYTES / 4}.get(row["mode"], H_BYTES)
            assert row["bytes_moved"]["down_bytes_per_batch"] == [down] * cuts + [0], row["mode"]
            assert row["bytes_moved"]["up_bytes_per_batch"] == [0] + [up] * cuts, row["mode"]


@pytest.mark.processes
def test_bytes_per_second_belong_to_the_throughput_of_their_round(over_stages: ScalingReport) -> None:
    """Once they were of a window a little longer: the spans' last step had the report of its loss in it."""
    for _, report in over_stages.points:
        for row in report.rows:
            moved = row.typical.bytes_moved if row.typical else None
            assert moved is not None
            batches_per_s = row.middle.samples_per_s / ROWS
            assert moved["down_mb_per_s"] == pytest.approx(
                [size * batches_per_s / 1e6 for size in moved["down_bytes_per_batch"]], rel=1e-9
            )


@pytest.mark.processes
def test_queues_are_measured_behind_the_first_stage(over_stages: ScalingReport) -> None:
    for point in over_stages.as_dict()["over_stages"]:
        for row in point["rows"]:
            first, *others = zip(row["queue_depth"]["median"], row["queue_depth"]["max"], strict=True)
            assert first == (None, None)
            assert all(0 <= median <= largest for median, largest in others)
        depths = _row(point, "naive")["queue_depth"]["max"][1:]
        assert depths == [0] * len(depths), "one batch at a time: none waits behind it"


@pytest.mark.processes
def test_a_locked_stage_waits_for_the_link_both_ways(over_latency: ScalingReport) -> None:
    points = over_latency.as_dict()["over_latency_ms"]
    assert [point["latency_ms"] for point in points] == [0, 5, 20]
    for point in points:
        naive, unlocked = _row(point, "naive"), _row(point, "unlocked")
        assert naive["update_latency_s"]["p50"] >= 2 * point["latency_ms"] / 1e3
        # 1.5: whatever holds up the end of the warm-up makes the window of the seven batches behind it shorter.
        assert naive["samples_per_s"]["max"] <= 1.5 * ROWS / (2 * point["latency_ms"] / 1e3 or 1e-9)
        assert unlocked["gradient_age_s"]["p50"] >= 2 * point["latency_ms"] / 1e3, "a target comes back over the link"
    links = [report.resolved.plan.links for _, report in over_latency.points]
    assert [(link.latency_ms, link.bandwidth_mbps) for link in links if link] == [(0, 1000), (5, 1000), (20, 1000)]


@pytest.mark.processes
def test_the_finding_names_the_first_and_the_last_point(over_latency: ScalingReport) -> None:
    text = over_latency.finding()
    assert text.startswith("From 0 to 20 ms a hop: update latency of stage 0, unlocked ")
    assert "; naive " in text
    assert text.count("naive") == 3, "its latencies, and its throughput at both points"


@pytest.mark.processes
def test_curves_are_the_figures_of_bench_json(over_stages: ScalingReport) -> None:
    points = over_stages.as_dict()["over_stages"]
    for curve in curves_of(over_stages, "latency"):
        rows = [_row(point, curve.name) for point in points]
        assert curve.at == (1, 2, 4)
        assert (curve.kind == "unlocked") == (curve.name == "unlocked")
        assert curve.middle == tuple(row["update_latency_s"]["p50"] * 1e3 for row in rows)
        assert curve.high == tuple(row["update_latency_s"]["p99"] * 1e3 for row in rows)
    throughput = {curve.name: curve for curve in curves_of(over_stages, "throughput")}
    assert list(throughput) == ["naive", "1f1b", "local", "unlocked"], "whatever the number of microbatches"
    assert throughput["naive"].middle == tuple(_row(point, "naive")["samples_per_s"]["median"] for point in points)
    assert throughput["naive"].low == tuple(_row(point, "naive")["samples_per_s"]["min"] for point in points)


@pytest.mark.processes
def test_rounds_are_the_outer_loop(over_stages: ScalingReport) -> None:
    """The machine's drift hits all points: the second round of the first point comes after the first of the last."""
    first, last = over_stages.folder / "stages-1", over_stages.folder / "stages-4"
    second_round = (first / "naive-2" / "plan.json").stat().st_mtime_ns
    assert second_round > (last / "unlocked-1" / "plan.json").stat().st_mtime_ns
    assert second_round < (last / "naive-2" / "plan.json").stat().st_mtime_ns


def test_a_point_that_cannot_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="over_stages 9: "):
        _sweep(tmp_path, "--over-stages 2 9")
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_are_given_fit_one_number_of_stages(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="over_stages 3: sizes has 2 numbers for 3 stages"):
        _sweep(tmp_path, "--sizes 2 3 --over-stages 3")


def test_rows_of_others_cannot_run_over_a_latency(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="ddp cannot be emulated"):
        _sweep(tmp_path, "--over-latency-ms 3 --rows ddp unlocked")


def test_axes_read_and_place_their_value() -> None:
    assert (STAGES.of(Plan(stages=3)), STAGES.place(Plan(stages=3), 5.0)) == (3, Plan(stages=5))
    assert (LATENCY.of(Plan()), LATENCY.place(Plan(), 0.0).link) == (0.0, "latency_ms=0")
    wide = Plan(link="bandwidth_mbps=100,latency_ms=7")
    assert (LATENCY.of(wide), LATENCY.place(wide, 2.5).link) == (7.0, "latency_ms=2.5,bandwidth_mbps=100")


def test_the_axis_is_the_one_asked_for() -> None:
    assert axis_of(BenchOptions()) is None
    assert axis_of(BenchOptions(over_stages=(1,))) is STAGES
    assert axis_of(BenchOptions(over_latency_ms=(0.0,))) is LATENCY


@pytest.mark.processes
def test_a_row_is_called_the_same_at_every_point(over_stages: ScalingReport) -> None:
    reports: list[Report] = [report for _, report in over_stages.points]
    assert {mode_name(row) for report in reports for row in report.rows} == {"naive", "1f1b", "local", "unlocked"}
    assert {row.name for report in reports for row in report.rows if row.contender.mode == "1f1b"} <= {
        "1f1b x2",
        "1f1b x4",
        "1f1b x8",
    }
