"""Time to accuracy: a run ends when the held-out data shows what was asked for, and everybody is told the same way.

A fast process may be over before it is heard, so tests with processes give it many more batches than the goal needs.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
from oracle import assert_same, train_alone
from rich.console import Console as RichConsole
from safetensors.torch import load_file
from torch import nn

from launch import cli, train
from launch.bench.compare import run_bench
from launch.bench.report import Report
from launch.bench.rivals import RivalRun, run_ddp, run_torch_schedule
from launch.bench.rivals.timed_loop import TimedLoop
from launch.bench.single_process import run_single
from launch.bench.time_to_goal import EXACT, OTHERS, PEERS, UNLOCKED, Line, Race, break_even
from launch.options.options import BenchOptions, RunOptions, parse
from launch.setup.recipe_source import NamedRecipe
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import OptimizerPlan, Plan, PlanError, Recipe, correct_predictions, run_reference
from pipeline.data.loader import inputs
from pipeline.messages.message import Kind
from pipeline.plan.check import check_plan
from pipeline.plan.goal import Goal, Reached
from pipeline.run.resolve import resolve
from pipeline.stage.evaluation import EvaluationMetrics, scores_of

WITHIN_S = 60.0


# ---------------------------------------------------------------- the goal


def test_a_goal_is_read_from_text_and_knows_when_it_is_met() -> None:
    accuracy, loss = Goal.parse("accuracy=0.98", "until"), Goal.parse("loss=1.9", "until")
    assert (accuracy, loss) == (Goal("accuracy", 0.98), Goal("loss", 1.9))
    assert (str(accuracy), str(loss)) == ("accuracy=0.98", "loss=1.9")
    assert [accuracy.met(9.0, share) for share in (0.97, 0.98, 0.99, None)] == [False, True, True, False]
    assert [loss.met(value, None) for value in (1.91, 1.9, 0.0, math.nan)] == [False, True, True, False]
    assert Goal.parse("accuracy=1", "until").met(0.0, 1.0), "all of them may be asked for"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("acuracy=0.9", "unknown metric in until 'acuracy'; did you mean 'accuracy'? Valid: accuracy, loss."),
        ("0.98", "unknown metric in until '0.98'; Valid: accuracy, loss."),
        ("", "unknown metric in until ''; Valid: accuracy, loss."),
        ("accuracy", "until accuracy: give the share of right answers, in (0, 1], as in accuracy=0.98."),
        ("accuracy=98", "until accuracy=98: give the share of right answers, in (0, 1], as in accuracy=0.98."),
        ("accuracy=0", "until accuracy=0: give the share of right answers, in (0, 1], as in accuracy=0.98."),
        ("accuracy=nan", "until accuracy=nan: give the share of right answers, in (0, 1], as in accuracy=0.98."),
        ("loss=0", "until loss=0: give a number above 0, as in loss=1.9."),
        ("loss=-1", "until loss=-1: give a number above 0, as in loss=1.9."),
        ("loss=inf", "until loss=inf: give a number above 0, as in loss=1.9."),
        ("loss=low", "until loss=low: give a number above 0, as in loss=1.9."),
    ],
)
def test_what_is_no_goal_is_refused_with_what_would_be_one(text: str, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_plan(Plan(until=text))
    assert caught.value.problems == (sentence,)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (Plan(until="loss=1", deterministic=True), "which no deterministic run repeats: leave one of them out."),
        (Plan(until="loss=1", emulate="stage_ms=1"), "where nothing is learned: leave one of them out."),
    ],
)
def test_a_plan_that_could_not_stop_is_refused(plan: Plan, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    (problem,) = caught.value.problems
    assert problem.startswith("until ")
    assert problem.endswith(sentence)


def _no_batches() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize(
    ("recipe", "until", "sentence"),
    [
        (replace(problems.recipe(), evaluation=None), "loss=1", "until has no effect without held-out batches: leave"),
        (replace(problems.recipe(), evaluation=_no_batches), "loss=1", "evaluation() gives no batch: give held-out"),
        (replace(problems.recipe(), correct=None), "accuracy=0.9", "until accuracy=0.9: the recipe counts no right"),
    ],
    ids=["no evaluation", "empty evaluation", "no right answers"],
)
def test_a_recipe_that_cannot_show_the_goal_is_refused(recipe: Recipe, until: str, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        resolve(recipe, Plan(mode="naive", until=until))
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("steps", "given", "every"), [(2000, None, 50), (300, None, 10), (5, None, 5), (300, 50, 50), (300, 1, 1)]
)
def test_how_often_one_looks_is_decided_and_recorded(steps: int, given: int | None, every: int) -> None:
    """Forty times in a run; in a short one less often, since a look may cost as much as many batches."""
    plan = Plan(mode="naive", steps=steps, until="loss=1", evaluate_every=given)
    resolved = resolve(problems.recipe(), plan)
    assert resolved.plan.evaluate_every == every
    (reason,) = (reason for reason in resolved.reasons if reason[0] == "until")
    apart = "batch" if every == 1 else f"{every} batches"
    looks = f"held-out data, looked at every {apart}; {steps:,} batches at most"
    assert reason == ("until", "loss=1", looks)
    assert resolved.warmup == max(1, min(steps // 10, every - 1)), "the run may end after the first look"
    assert resolve(problems.recipe(), replace(plan, until=None)).plan.evaluate_every == given


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train mlp --until loss=1", "until has no effect without held-out batches"),
        ("bench mlp --until loss=1", "until has no effect without held-out batches"),
        ("bench digits --until accuracy=1.1", "until accuracy=1.1: give the share of right answers"),
        ("bench digits --evaluate-every 3", "a benchmark evaluates once, at the end of each run: leave"),
    ],
)
def test_the_command_line_refuses_before_anything_starts(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run_command([*command.split(), "--runs", str(tmp_path / "runs")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"freewheel: {message}")
    assert not (tmp_path / "runs").exists()


def test_the_next_command_looks_as_often_only_where_bench_looks() -> None:
    typed = ["--evaluate-every", "5", "--stages", "3"]
    assert cli._after_training("digits", typed, Plan(), 9)[0] == "freewheel bench digits --stages 3"
    with_goal = cli._after_training("digits", [*typed, "--until", "loss=1"], Plan(until="loss=1"), 9)[0]
    parsed = parse("digits", with_goal.split()[3:], BenchOptions, "freewheel bench")
    assert (parsed.plan.until, parsed.plan.evaluate_every, parsed.plan.stages) == ("loss=1", 5, 3)
    assert parse("digits", [], RunOptions, "freewheel train").plan.until is None


# ---------------------------------------------------------------- how a run ends


def test_when_it_is_enough_a_last_pass_and_the_end_come_before_the_next_batch() -> None:
    plan = Plan(mode="gpipe", microbatches=2, steps=9, evaluate_every=2)
    for taken, passes in ((4, [2, 4]), (5, [2, 4, 5])):
        answers = iter([False] * taken + [True])
        messages = list(inputs(problems.recipe(), plan, 9, enough=partial(next, answers)))
        kinds = [message.kind for message in messages]
        assert [m.batch for m in messages if m.kind is Kind.ACTIVATION] == [b for b in range(taken) for _ in range(2)]
        assert [m.batch for m in messages if m.kind is Kind.REPORT] == passes, "none is made twice"
        assert kinds[-5:] == [Kind.EVALUATION] * 3 + [Kind.REPORT, Kind.END]
        assert messages[-1].batch == taken


PLAN = Plan(mode="naive", stages=3, sizes=(1, 5, 2), steps=3000, evaluate_every=2, optimizer=OptimizerPlan(lr=3e-3))


@pytest.mark.parametrize("mode", ["naive", "gpipe", "unlocked"])
def test_the_reference_driver_stops_and_what_it_trained_is_the_beginning_of_the_whole_run(mode: str) -> None:
    """Bit for bit, whatever had been under way when the last stage had the scores."""
    parts = 4 if mode == "gpipe" else 1
    plan = replace(PLAN, mode=mode, microbatches=parts, until="loss=1.5")
    mine = run_reference(problems.recipe(), plan)
    trained = len(mine.losses)
    assert mine.reached is not None
    assert mine.reached <= trained <= mine.reached + 10
    assert mine.reached == next(n for n, scores in mine.scores if scores.loss() <= 1.5)
    assert mine.scores[-1][0] == trained, "the weights that are kept are evaluated"
    whole = run_reference(problems.recipe(), replace(plan, until=None, steps=trained))
    assert_same(mine.state_tensors(), whole.state_tensors())
    assert whole.reached is None, "nobody asked"


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["naive", "1f1b"])
def test_a_locked_run_that_ends_early_is_the_beginning_of_the_whole_one(mode: str, tmp_path: Path) -> None:
    """Bit for bit, at the number of batches it reports; the goal is met at the look at which the reference meets it."""
    plan = replace(PLAN, mode=mode, microbatches=4 if mode == "1f1b" else 1)
    updates = run_reference(problems.recipe(), replace(plan, until="loss=1.5")).reached
    assert updates is not None
    result = train(
        model=problems.dropout_and_batch_norm,
        batches=problems.batch,
        loss=nn.functional.cross_entropy,
        evaluation=problems.held_out,
        correct=correct_predictions,
        plan=replace(plan, until="loss=1.5"),
        runs=tmp_path,
        quiet=True,
    )
    assert result.reached is not None
    assert result.reached.updates == updates
    assert updates <= result.steps < 3000
    truth = run_reference(problems.recipe(), replace(plan, steps=result.steps))
    assert_same(result.state_tensors(), truth.state_tensors())
    assert result.losses == truth.losses
    assert result.loss == truth.scores[-1][1].loss(), "that of the weights that were kept"
    assert (result.reached.loss, result.reached.accuracy) == _scores_after(truth.scores, updates)
    assert 0 < result.reached.seconds <= result.seconds
    written = json.loads((result.run_dir / "result.json").read_text())
    assert (written["steps"], written["samples"]) == (result.steps, result.steps * problems.ROWS)
    assert (written["until_s"], written["until_samples"]) == (result.reached.seconds, updates * problems.ROWS)
    assert f"loss=1.5 reached after {updates} batches" in result.summary()
    assert len({record.updated for record in result.finished.values()}) == 1, "all stages made the same updates"


def _scores_after(scores: list[tuple[int, EvaluationMetrics]], updates: int) -> tuple[float, float | None]:
    found = dict(scores)[updates]
    return found.loss(), found.accuracy()


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["unlocked", "naive"])
def test_digits_stop_at_nine_out_of_ten(mode: str, tmp_path: Path) -> None:
    source, plan = NamedRecipe("digits"), Plan(mode=mode, steps=2000, until="accuracy=0.9", evaluate_every=5)
    result = run(source, resolve_source(source, plan), tmp_path, None, Console(quiet=True))
    assert result.reached is not None
    assert result.reached.accuracy is not None
    assert result.reached.accuracy >= 0.9
    assert result.reached.updates == next(s.updates for s in result.scores if s.accuracy and s.accuracy >= 0.9)
    assert result.reached.updates <= result.steps < 1000
    assert result.samples_per_s is not None
    assert [record.updated for record in result.finished.values()] == [result.steps] * 2


@pytest.mark.processes
def test_a_goal_that_is_not_reached_is_null(tmp_path: Path) -> None:
    source, plan = problems.recipe, replace(PLAN, steps=6, until="accuracy=1")
    result = run(source, resolve_source(source, plan), tmp_path, "r", Console(quiet=True))
    assert (result.reached, result.steps) == (None, 6)
    assert (result.as_dict()["until_s"], result.as_dict()["until_samples"]) == (None, None)
    assert "accuracy=1 was not reached" in result.summary()
    single = run_single(source, resolve_source(source, plan).plan, threads=1, warmup=1, within_s=WITHIN_S)
    assert (single.reached, single.batches) == (None, 5)


# ---------------------------------------------------------------- the others stop the same way


def with_relu() -> nn.Sequential:
    """Eight layers without random numbers; a second stage of 3 | 5 begins with one that writes to its input."""
    pairs = [(nn.Linear(problems.WIDTH, problems.WIDTH), nn.ReLU(inplace=True)) for _ in range(3)]
    head = (nn.Linear(problems.WIDTH, 24), nn.Linear(24, problems.CLASSES))
    return nn.Sequential(*(layer for pair in pairs for layer in pair), *head)


def plain() -> Recipe:
    """Everybody's training of it is the same; three held-out batches, the last one smaller."""
    return replace(problems.recipe(), model=with_relu)


def batch_norm() -> nn.Sequential:
    """What DDP's ranks see of it differs, down to the running means."""
    return nn.Sequential(
        nn.Linear(problems.WIDTH, 24), nn.BatchNorm1d(24, momentum=0.5), nn.ReLU(), nn.Linear(24, problems.CLASSES)
    )


def with_batch_norm() -> Recipe:
    """Evaluated with the running means of rank 0 by all."""
    return replace(problems.recipe(), model=batch_norm)


STEPS, EVERY = 40, 4
TOLERANCE = 1e-4  # sums in another order, up to 40 steps of Adam
PEERS_PLAN = Plan(mode="naive", stages=2, sizes=(3, 5), steps=STEPS, evaluate_every=EVERY)


@cache
def _alone(updates: int) -> tuple[float, float | None]:
    """Held-out loss and accuracy of a plain loop after so many batches."""
    model, _, _ = train_alone(plain(), replace(PEERS_PLAN, steps=updates))
    scores = scores_of(plain(), model)
    return scores.loss(), scores.accuracy()


@cache
def _between() -> tuple[str, int]:
    """A loss between that of two looks, and the later of the two: the first that is below."""
    losses = [_alone(updates)[0] for updates in range(EVERY, STEPS, EVERY)]
    assert all(later < earlier - 10 * TOLERANCE for earlier, later in pairwise(losses))
    return f"loss={(losses[4] + losses[5]) / 2:.6g}", 6 * EVERY


def _run_single(plan: Plan) -> RivalRun:
    return run_single(plain, resolve_source(plain, plan).plan, threads=1, warmup=1, within_s=WITHIN_S)


def _run_ddp(plan: Plan) -> RivalRun:
    return run_ddp(plain, resolve_source(plain, plan), ranks=2, threads=1, warmup=1, within_s=WITHIN_S)


def _run_schedule(schedule: str, microbatches: int, plan: Plan) -> RivalRun:
    resolved = resolve_source(plain, plan)
    options: dict[str, Any] = {"microbatches": microbatches, "threads": 1, "warmup": 1, "within_s": WITHIN_S}
    return run_torch_schedule(plain, resolved, schedule, **options)


PEER_RUNS: dict[str, Callable[[Plan], RivalRun]] = {
    "single": _run_single,
    "ddp": _run_ddp,
    "GPipe": partial(_run_schedule, "GPipe", 4),
    "Interleaved1F1B": partial(_run_schedule, "Interleaved1F1B", 4),
    "ZBVZeroBubble": partial(_run_schedule, "ZBVZeroBubble", 2),
}


@pytest.mark.processes
@pytest.mark.parametrize("name", PEER_RUNS)
def test_every_row_meets_the_goal_at_the_same_look_and_trains_no_batch_more(name: str) -> None:
    until, updates = _between()
    done = PEER_RUNS[name](replace(PEERS_PLAN, until=until))
    assert done.reached is not None
    assert done.reached.updates == updates
    assert (done.reached.loss, done.reached.accuracy) == pytest.approx(_alone(updates), abs=TOLERANCE)
    assert (done.loss, done.accuracy) == pytest.approx(_alone(updates), abs=TOLERANCE), "nothing was trained after it"
    assert done.batches == updates - 1
    assert 0 < done.seconds < done.reached.seconds, "warm-up and the last look count on the way to the goal only"


@pytest.mark.processes
@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_looking_changes_nothing_in_the_training_of_a_schedule(schedule: str, tmp_path: Path) -> None:
    resolved, weights = resolve_source(plain, replace(PEERS_PLAN, steps=9, until="accuracy=1")), tmp_path / "weights"
    options: dict[str, Any] = {"microbatches": 4, "threads": 1, "warmup": 1, "within_s": WITHIN_S, "weights": weights}
    done = run_torch_schedule(plain, resolved, schedule, **options)
    assert (done.reached, done.batches) == (None, 8)
    model, _, _ = train_alone(plain(), replace(PEERS_PLAN, steps=9))
    mine = load_file(weights)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(mine[key], tensor, rtol=0, atol=TOLERANCE)


@pytest.mark.processes
def test_all_ranks_of_ddp_look_with_the_running_means_of_the_first() -> None:
    """As the weights that are kept have them: the look that met the goal and the final one give the same scores."""
    plan = Plan(mode="naive", stages=2, steps=400, evaluate_every=3, until="loss=1.3", balance="layers")
    resolved = resolve_source(with_batch_norm, plan)
    done = run_ddp(with_batch_norm, resolved, ranks=2, threads=1, warmup=1, within_s=WITHIN_S)
    assert done.reached is not None
    assert (done.reached.loss, done.reached.accuracy) == pytest.approx((done.loss, done.accuracy), abs=1e-6)


def test_a_loop_that_meets_its_goal_within_the_warm_up_counts_all_its_batches() -> None:
    plan = Plan(steps=9, evaluate_every=2, until="loss=1")
    assert list(loop := TimedLoop(plan, 3, look=lambda: EvaluationMetrics(loss_sum=0.5, rows=1))) == [0, 1]
    assert loop.batches == 2
    assert loop.reached is not None
    assert (loop.reached.updates, loop.reached.loss, loop.reached.accuracy) == (2, 0.5, None)
    assert 0 < loop.seconds <= loop.reached.seconds


def test_a_loop_looks_when_it_should_and_starts_its_clock_together() -> None:
    looks: list[int] = []
    starts: list[int] = []
    trained: list[int] = []

    def look() -> EvaluationMetrics:
        looks.append(len(trained))
        return EvaluationMetrics(loss_sum=2.0, rows=1)

    plan = Plan(steps=8, evaluate_every=3, until="loss=1")
    loop = TimedLoop(plan, 2, look=look, together=lambda: starts.append(len(trained)))
    for step in loop:
        trained.append(step)
    assert (trained, looks, starts) == (list(range(8)), [3, 6, 8], [0, 2])
    assert (loop.batches, loop.reached) == (6, None)
    looks.clear()
    assert list(TimedLoop(replace(plan, until=None), 2)) == list(range(8))
    assert looks == []


# ---------------------------------------------------------------- what a benchmark says


def _line(name: str, kind: str, rates: list[float], *reached: tuple[int, float] | None) -> Line:
    """Samples per second, and (batches, seconds) to the goal, of every round."""
    return Line(name, kind, rates, [None if one is None else Reached(*one, loss=0.5, accuracy=0.9) for one in reached])


def _race(*lines: Line) -> Race:
    resolved = resolve(problems.recipe(), Plan(mode="naive", steps=120, until="accuracy=0.9"))
    return Race(Goal("accuracy", 0.9), resolved, lines)


ONE = _line("one process", "", [100, 100, 100], (40, 8.0), (40, 10.0), (40, 12.0))
NAIVE = _line("naive", EXACT, [80, 90, 100], (40, 12.0), (40, 10.0), (40, 12.0))
GPIPE = _line("gpipe x4", EXACT, [70, 70, 70], (40, 14.0), (40, 15.0), (40, 16.0))
ZBV = _line("torch ZBV x4", PEERS, [60, 60, 60], (40, 20.0), (40, 20.0), (40, 20.0))
FAST = _line("unlocked", UNLOCKED, [160, 180, 150], (50, 6.0), (44, 6.0), (48, 6.0))


def test_the_verdict_says_who_was_first_and_what_unlocking_did_to_seconds_and_batches() -> None:
    assert _race(ONE, NAIVE, GPIPE, ZBV, FAST).verdict() == (
        "To accuracy=0.9: unlocked was first, after 6.00 s and 48 batches. Unlocked needed "
        "0.50x (0.50 to 0.60) the seconds and 1.20x the batches of the best exact locked row (naive), "
        "0.30x (0.30 to 0.30) the seconds and 1.20x the batches of "
        "the best torch.distributed.pipelining row (torch ZBV x4), "
        "0.60x (0.50 to 0.75) the seconds and 1.20x the batches of one process."
    )


def test_the_verdict_says_a_loss_like_a_gain_and_names_who_never_got_there() -> None:
    slow = _line("unlocked", UNLOCKED, [160, 160, 160], (80, 11.0), (80, 11.0), (80, 13.2))
    local = _line("local", OTHERS, [200, 200, 200], None, None, None)
    late = _line("async-1f1b", OTHERS, [150, 150, 150], (90, 9.0), None, (90, 9.0))
    assert _race(ONE, NAIVE, local, late, slow).verdict() == (
        "To accuracy=0.9: one process was first, after 10.00 s and 40 batches. Unlocked needed "
        "1.10x (0.92 to 1.10) the seconds and 2.00x the batches of the best exact locked row (naive), "
        "1.10x (1.10 to 1.38) the seconds and 2.00x the batches of one process. "
        "Unlocking comes later here than naive, one process. "
        "Never within 120 batches: local. async-1f1b reached it in 2 of 3 rounds."
    )
    never = _line("unlocked", UNLOCKED, [160, 160, 160], None, None, None)
    assert _race(ONE, never).verdict() == (
        "To accuracy=0.9: one process was first, after 10.00 s and 40 batches. Never within 120 batches: unlocked."
    )
    assert _race(never).verdict() == "To accuracy=0.9: no row reached it in every round within 120 batches."


def test_the_table_has_a_line_for_every_row() -> None:
    never = _line("local", OTHERS, [1, 1, 1], (40, 9.0), None, None)
    console = RichConsole(width=80, record=True, file=io.StringIO())
    console.print(_race(ONE, FAST, never).table())
    assert [" ".join(line.split()) for line in console.export_text().splitlines()] == [
        "to accuracy=0.9, in batches of 16; x: over one process",
        "mode reached seconds x seconds batches x batches",
        "one process 3 of 3 10.00 (8.00-12.00) 1.00 40 1.00",
        "unlocked 3 of 3 6.00 (6.00-6.00) 0.60 48 1.20",
        "local 1 of 3 - - - -",
    ]


def test_how_many_more_batches_unlocking_may_need_follows_from_the_throughputs() -> None:
    bare = [replace(line, reached=()) for line in (ONE, GPIPE, NAIVE, FAST)]
    assert break_even(bare) == "Unlocking may need up to 2.00x the batches of naive before its gain is gone."
    slow = replace(FAST, rates=[40, 45, 50])
    assert break_even([NAIVE, slow]) == (
        "Unlocking would have to get by with 0.50x the batches of naive to be worth it."
    )
    assert break_even([ONE, FAST]) == break_even([ONE, NAIVE]) == ""


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """One round of digits to nine out of ten, and what was printed."""
    folder = tmp_path_factory.mktemp("until")
    console = Console()
    console.rich = RichConsole(width=80, record=True, highlight=False, file=io.StringIO())
    plan = Plan(steps=600, until="accuracy=0.9", evaluate_every=5)
    rows = ("backprop", "ddp", "naive", "unlocked")
    report = run_bench(NamedRecipe("digits"), plan, BenchOptions(rounds=1, runs=folder, rows=rows), ["bench"], console)
    return report, console.rich.export_text()


@pytest.mark.processes
def test_a_benchmark_tells_when_every_row_was_there(benched: tuple[Report, str]) -> None:
    report, out = benched
    rows = {(row["engine"], row["mode"]): row for row in json.loads(json.dumps(report.as_dict()))["rows"]}
    assert len(rows) == 4
    for row in rows.values():
        assert row["until_s"] > 0
        assert 0 < row["until_samples"] < 600 * 128
        assert row["until_samples"] % (5 * 128) == 0, "at a look"
        assert row["samples_per_s"]["median"] > 0
        assert row["accuracy"] is not None
    verdict = report.verdict
    assert "To accuracy=0.9: " in verdict
    assert "the batches of the best exact locked row (" in verdict
    assert "after the same" not in verdict, "rows ended after different numbers of batches"
    shown = " ".join(out.split())
    assert verdict in shown
    assert "to accuracy=0.9, in batches of 128; x: over one process" in shown
    assert "Every row pays on its clock for its looks at the held-out data (4 batches, after every 5" in shown
    assert shown.index("To accuracy=0.9") < shown.index("to accuracy=0.9, in batches"), "verdict first"
