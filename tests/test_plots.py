"""Pictures of a benchmark: what they are drawn from is tested as values, the files for being there and their size."""

from __future__ import annotations

import importlib
import itertools
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.bench.compare import run_bench
from launch.bench.report import BenchRow, Report
from launch.bench.rows import Contender, RowOutcome
from launch.bench.scaling import AXES, ScalingReport, bench_over
from launch.options.options import BenchOptions, parse
from launch.plots import INSTALL, draw
from launch.plots.blocks import PHASES, ShownTime, SpanBlock, blocks, period_s, shared_window_s, window_of
from launch.plots.curves import apart
from launch.plots.timeline import shown_rows
from launch.plots.words import curves_title, subtitle, throughput_title, timeline_title, times
from launch.results.run_folder import read_spans
from launch.show.console import Console
from pipeline import Plan
from pipeline.metrics.spans import SPAN_DTYPE, Span, Spans

TYPED = "--layers 4 --hidden 16 --batch 8 --emulate stage_ms=2,dni_ms=0.2 --steps 10 --rounds 1"
LETTERS = {
    ".": Span.WAIT,
    ":": Span.OTHER,
    "F": Span.FORWARD,
    "D": Span.DNI,
    "T": Span.DNI_TRAIN,
    "B": Span.BACKWARD,
    "S": Span.STEP,
    "R": Span.RELAY,
    ">": Span.SEND,
    "<": Span.RECEIVE,
}


def _spans(diagram: str) -> Spans:
    """One cell per nanosecond: what the worker does, and the batch."""
    cells = diagram.split()
    records = [(LETTERS[cell[0]], int(cell[1:] or -1), -1, start) for start, cell in enumerate(cells)]
    return Spans(np.array([*records, (Span.OTHER, -1, -1, len(cells))], dtype=SPAN_DTYPE))


# ---------------------------------------------------------------- the blocks of a timeline


def test_blocks_are_phases_of_batches() -> None:
    """Backward and step are one block, and so is what a worker does twice without a pause."""
    spans = _spans("F0 F0 >0 D0 B0 B0 S0 . . F1 . B1 T0 R0 :")
    assert blocks(spans, ShownTime(0, 15)) == [
        SpanBlock("forward", 0, 0, 2),
        SpanBlock("send + receive", 0, 2, 3),
        SpanBlock("dni", 0, 3, 4),
        SpanBlock("backward + step", 0, 4, 7),
        SpanBlock("forward", 1, 9, 10),
        SpanBlock("backward + step", 1, 11, 12),
        SpanBlock("dni", 0, 12, 13),
        SpanBlock("relay", 0, 13, 14),
        SpanBlock("other", -1, 14, 15),
    ]


def test_a_wait_keeps_blocks_apart_and_the_window_cuts_them() -> None:
    assert blocks(_spans("F0 F0 F0 . F0 F0"), ShownTime(1, 5)) == [
        SpanBlock("forward", 0, 1, 3),
        SpanBlock("forward", 0, 4, 5),
    ]


cells = st.lists(st.sampled_from([f"{letter}{batch}" for letter in LETTERS for batch in (0, 1)]), min_size=1)


@settings(deadline=None, max_examples=100)
@given(diagram=cells, edges=st.tuples(st.integers(0, 30), st.integers(1, 30)))
def test_blocks_cover_what_the_spans_do_and_nothing_else(diagram: list[str], edges: tuple[int, int]) -> None:
    spans, window = _spans(" ".join(diagram)), ShownTime(edges[0], sum(edges))
    found = blocks(spans, window)
    inside = spans.within(window.start_ns, window.end_ns)
    for phase in set(PHASES.values()):
        kinds = [kind for kind, name in PHASES.items() if name == phase]
        length_ns = sum(block.end_ns - block.start_ns for block in found if block.phase == phase)
        assert length_ns == round(inside.seconds(*kinds) * 1e9)
    assert all(before.end_ns <= after.start_ns for before, after in itertools.pairwise(found))


def test_every_kind_of_span_but_waiting_has_a_phase() -> None:
    assert PHASES.keys() == set(Span) - {Span.WAIT, Span.HELD}


def test_the_window_lies_in_the_middle_and_begins_with_a_forward_of_the_first_stage() -> None:
    below = _spans("F0 S0 F1 S1 F2 S2 F3 S3 F4 S4 . .")
    above = _spans(". . F0 S0 F1 S1 F2 S2 F3 S3 F4 S4")
    assert window_of([below, above], 4e-9) == ShownTime(4, 8), "around (4 + 8) / 2, between F2 below and S2 above"
    assert window_of([below, above], 11e-9) == ShownTime(0, 11), "what does not fit begins with the run"


def test_all_rows_share_one_length() -> None:
    """A batch every 2 ns, and every 20 ns: 12 of the fast are too few to see one of the slow, 1.25 of that is shown."""
    fast = [_spans(" ".join(f"F{b} S{b}" for b in range(30)))]
    slow = [_spans(" ".join(f"F{b} {'. ' * 18} S{b}" for b in range(4)))]
    very_slow = [_spans(" ".join(f"F{b} {'. ' * 998} S{b}" for b in range(3)))]
    assert (period_s(fast), period_s(slow)) == (pytest.approx(2e-9), pytest.approx(20e-9))
    assert shared_window_s([fast, slow]) == pytest.approx(25e-9)
    assert shared_window_s([fast]) == pytest.approx(8e-9), "four batches at least"
    assert shared_window_s([fast, very_slow]) == pytest.approx(160e-9), "80 batches of the fast are the most"


def test_one_batch_has_no_period() -> None:
    with pytest.raises(ValueError, match="1 batches came out of the pipeline: two are needed"):
        period_s([_spans("F0 S0")])


# ---------------------------------------------------------------- labels and words


@given(positions=st.lists(st.floats(0, 100), max_size=8))
def test_labels_are_pushed_apart_and_keep_their_order(positions: list[float]) -> None:
    moved = apart(positions, 10, 0, 100)
    ordered = sorted(moved)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert all(-1e-9 <= each <= 100 + 1e-9 for each in moved)
    ranks = sorted(range(len(positions)), key=positions.__getitem__)
    assert [moved[index] for index in ranks] == ordered
    if all(abs(a - b) >= 10 for i, a in enumerate(positions) for b in positions[:i]):
        assert moved == positions, "nothing moves without need"


def _row(mode: str, *rates: float, engine: str = "freewheel", parts: int | None = None) -> BenchRow:
    def never(folder: Path, name: str) -> RowOutcome:
        raise AssertionError("nothing is run")

    contender = Contender(engine=engine, mode=mode, stages=2, threads=1, microbatches=parts, train=never)
    return BenchRow(contender, [RowOutcome(rate, 0.5, None, (1,)) for rate in rates])


def _report(*rows: BenchRow, **plan: Any) -> Report:
    resolved: Any = SimpleNamespace(plan=Plan(steps=40, **plan), steps=40, batch_shape=(128, 64), step_rows=128)
    environment = {"processor": "Some CPU", "cores": 2}
    return Report("digits", resolved, Path("nowhere"), [], environment, list(rows), {})


SINGLE = _row("backprop", 100, 110, 90, engine="single")


def test_the_title_says_what_unlocking_bought() -> None:
    report = _report(SINGLE, _row("naive", 50, 55, 45), _row("unlocked", 193, 210, 175))
    assert throughput_title(report) == "Unlocked: 1.93x one process, 3.86x naive"


def test_the_title_says_who_beats_it() -> None:
    report = _report(SINGLE, _row("naive", 80, 80, 80), _row("unlocked", 90, 90, 90))
    assert throughput_title(report) == "Unlocked: 0.90x one process, 1.12x naive; one process beats it"
    report.rows.append(_row("async-1f1b", 95, 95, 95))
    assert throughput_title(report).endswith("; 2 rows beat it")


def test_the_title_without_an_unlocked_row() -> None:
    assert throughput_title(_report(SINGLE, _row("naive", 120, 120, 120))) == "naive is fastest"


def test_the_yardstick_is_named_once_when_it_is_the_best_locked_row() -> None:
    report = _report(_row("naive", 50, 50, 50), _row("unlocked", 1000, 1000, 1000))
    assert throughput_title(report) == "Unlocked: 20.0x naive"


def test_the_subtitle_says_under_which_circumstances() -> None:
    plain = subtitle(_report(SINGLE)).replace("\N{NO-BREAK SPACE}", " ").split("  ·  ")
    assert plain == ["digits", "2 stages", "batch 128", "3 rounds of 40 batches", "Some CPU, 2 cores"]
    report = _report(_row("naive", 1), stages=1, emulate="stage_ms=10", link="latency_ms=5")
    emulated = subtitle(report).replace("\N{NO-BREAK SPACE}", " ").split("  ·  ")
    assert emulated[1:4:2] == ["1 stage", "1 round of 40 batches"]
    assert emulated[-1] == "emulated stage_ms=10,latency_ms=5"
    over_link = subtitle(report, over="latency_ms").replace("\N{NO-BREAK SPACE}", " ")
    assert over_link.endswith("emulated stage_ms=10"), "the latency is the axis"
    assert "stage  ·" not in subtitle(report, over="stages")


def test_the_timeline_shows_the_best_locked_row_and_the_unlocked_one() -> None:
    naive, gpipe, unlocked = _row("naive", 50), _row("gpipe", 60, parts=4), _row("unlocked", 90)
    assert shown_rows(_report(naive, gpipe, unlocked)) == [gpipe, unlocked]
    assert shown_rows(_report(SINGLE, unlocked)) == [unlocked]
    assert shown_rows(_report(SINGLE)) == [], "others leave no spans"


# ---------------------------------------------------------------- the files


@dataclass
class Heard(Console):
    """A console that remembers its extra lines."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(quiet=True)

    def extra(self, what: str, value: str, why: str) -> None:
        self.lines.append((what, value, why))


def _size(path: Path) -> tuple[int, int]:
    """Width and height in a PNG's header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert head[12:16] == b"IHDR"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A small emulated benchmark of three stages."""
    typed = f"{TYPED} --stages 3 --rows naive 1f1b unlocked --name b --runs {tmp_path_factory.mktemp('plots')}"
    parsed = parse("mlp", typed.split(), BenchOptions, "freewheel bench")
    return run_bench(parsed.source, parsed.plan, parsed.run, ["freewheel"], Console(quiet=True))


@pytest.mark.processes
def test_a_benchmark_has_a_picture_of_throughput_and_a_timeline(benched: Report) -> None:
    console = Heard()
    paths = draw(benched, console)
    assert [path.name for path in paths] == ["throughput.png", "timeline.png"]
    assert console.lines == [("pictures", "throughput.png, timeline.png", f"in {benched.folder}")]
    for path, at_least in zip(paths, (3 * 56, 6 * 40), strict=True):
        width, height = _size(path)
        assert width == 1200
        assert at_least < height < 1300
        assert path.stat().st_size > 10_000, "not an empty picture"


@pytest.mark.processes
def test_the_blocks_of_a_real_run_equal_its_spans(benched: Report) -> None:
    """In every stage the blocks of the whole run last as long as the spans, batch by batch."""
    for row in shown_rows(benched):
        assert row.middle.run_dir is not None
        for spans in read_spans(row.middle.run_dir):
            found = blocks(spans, ShownTime(int(spans.start_ns[0]), int(spans.end_ns[-1])))
            for phase, kinds in (("forward", [Span.FORWARD]), ("backward + step", [Span.BACKWARD, Span.STEP])):
                for batch in range(10):
                    mask = np.isin(spans.span, kinds) & (spans.batch == batch)
                    expected_ns = int((spans.end_ns[mask] - spans.start_ns[mask]).sum())
                    mine = [block for block in found if (block.phase, block.batch) == (phase, batch)]
                    assert sum(block.end_ns - block.start_ns for block in mine) == expected_ns > 0


@pytest.mark.processes
def test_the_titles_are_the_figures_of_the_report(benched: Report) -> None:
    unlocked = benched.unlocked
    assert unlocked is not None
    assert unlocked.typical is not None
    waiting = sum(stage.shares["waiting"] for stage in unlocked.typical.stages) / 3
    assert timeline_title(benched).startswith(f"Time in which stages wait: unlocked {waiting:.0%}, ")
    assert throughput_title(benched).startswith(f"Unlocked: {times(unlocked.speedup(benched.rows[0]).median)} naive")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("typed", "name"),
    [("--over-stages 1 3", "latency.png"), ("--over-latency-ms 0 4", "link.png")],
    ids=["stages", "link"],
)
def test_a_comparison_over_an_axis_has_its_curves(typed: str, name: str, tmp_path: Path) -> None:
    arguments = [*TYPED.split(), *typed.split(), "--rows", "naive", "unlocked", "--runs", str(tmp_path)]
    parsed = parse("mlp", arguments, BenchOptions, "freewheel bench")
    sweep = bench_over(parsed.source, parsed.plan, parsed.run, ["freewheel"], Console(quiet=True))
    paths = draw(sweep, Heard())
    assert [path.name for path in paths] == ["throughput.png", "timeline.png", name]
    assert {path.parent for path in paths} == {sweep.folder}
    assert _size(paths[-1])[0] == 1200
    assert curves_title(sweep).startswith(("At 3 stages: unlocked ", "At 4 ms a hop: unlocked "))


def test_curves_without_an_unlocked_row_name_the_fastest() -> None:
    report = _report(SINGLE, _row("naive", 120, 120, 120))
    sweep = ScalingReport(**vars(report), axis=AXES[0], points=((2.0, report),))
    assert curves_title(sweep) == "At 2 stages: naive is fastest"


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith(("launch.plots.", "matplotlib."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    console, report = Heard(), _report(SINGLE)
    report.folder = tmp_path
    assert draw(report, console) == []
    assert console.lines == [("pictures", "not drawn, there is no matplotlib", INSTALL)]
    assert list(tmp_path.iterdir()) == []


def test_the_command_works_without_matplotlib() -> None:
    """Nothing but the pictures imports it."""
    sources = Path(importlib.import_module("launch").__path__[0]).parent
    users = {
        path.relative_to(sources).as_posix()
        for package in ("pipeline", "workers", "launch")
        for path in (sources / package).rglob("*.py")
        if "from matplotlib" in path.read_text() or "import matplotlib" in path.read_text()
    }
    assert users
    assert {user.rpartition("/")[0] for user in users} == {"launch/plots"}
    assert "launch/plots/__init__.py" not in users
