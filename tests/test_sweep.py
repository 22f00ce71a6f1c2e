"""freewheel sweep: what a grid is, what is run of it, what is remembered, and what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from launch.options.options import parse
from launch.options.ray_options import TrainOptions
from launch.setup.recipe_source import NamedRecipe
from launch.sweep.axes import option_types, read_axes, value_of, with_value
from launch.sweep.command import keep_aside
from launch.sweep.findings import findings_of, label_of, verdict_of
from launch.sweep.grid import Grid, Setting, grid_of
from launch.sweep.options import PRESETS, SweepOptions, with_preset
from launch.sweep.picture import abscissa_of, sweep_curves
from launch.sweep.points import Outcome, Store, followed
from launch.sweep.work import run_point
from pipeline import Plan, PlanError, StageError, run_reference
from tests.test_cli import Ended, freewheel

RECIPE = '''
import os, signal
from functools import partial
from multiprocessing import connection, parent_process
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from pipeline import Plan, Recipe, correct_predictions

plan = Plan(stages=2, steps=20)

def _in_a_worker(trouble):
    driver = parent_process()
    if driver is None or trouble == "none":
        return
    if trouble == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "fails":
        raise ZeroDivisionError("as planned")
    if trouble == "interrupts":
        os.kill(driver.pid, signal.SIGINT)
    connection.wait([driver.sentinel], 100)

def _model(width, layers, batch_norm, trouble):
    _in_a_worker(trouble)
    norm = [nn.BatchNorm1d(width)] if batch_norm else [nn.Identity()]
    inner = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers - 2)]
    return nn.Sequential(nn.Sequential(nn.Linear(8, width), *norm), *inner, nn.Linear(width, 3))

def _batch(seed, index, rows=16):
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1000 * seed + index))
    return x, x[:, :3].argmax(1)

def _held_out():
    return [_batch(77, 0), _batch(77, 1)]

def recipe(width: int = 6, layers: int = 4, batch_norm: bool = True, trouble: str = "none", seed: int = 0) -> Recipe:
    """A recipe of my own."""
    return Recipe(name="mine", model=partial(_model, width, layers, batch_norm, trouble if seed == 1 else "none"),
                  batches=partial(_batch, seed), loss=cross_entropy, evaluation=_held_out, correct=correct_predictions)
'''


@pytest.fixture(autouse=True)
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, with the recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE)
    return tmp_path / "mine.py"


@pytest.fixture
def starts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No process is started."""

    def start(process: BaseProcess) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(BaseProcess, "start", start)


def _grid(typed: str, recipe: str = "mine.py") -> Grid:
    arguments = shlex.split(typed)
    return grid_of(recipe, arguments, parse(recipe, arguments, SweepOptions, "freewheel sweep", writes=False))


def _labels(grid: Grid) -> list[str]:
    return [label_of(grid, setting) for setting in grid.settings]


def _keys(setting: Setting) -> list[str]:
    return [point.key for point in setting.points.values()]


def _loads(text: str) -> Any:
    """Strict JSON: NaN and Infinity are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


# ---------------------------------------------------------------- the grid


def test_every_combination_with_every_seed() -> None:
    grid = _grid("--vary mode=unlocked,local --vary stages=2,3 --seeds 3,5")
    assert _labels(grid) == ["unlocked, stages 2", "unlocked, stages 3", "local, stages 2", "local, stages 3"]
    assert len(grid.points) == 8
    plans = [setting.points[seed].plan for setting in grid.settings for seed in (3, 5)]
    assert [(p.mode, p.stages, p.seed) for p in plans] == [
        (mode, stages, seed) for mode in ("unlocked", "local") for stages in (2, 3) for seed in (3, 5)
    ]
    sources = [dict(setting.points[5].source.options) for setting in grid.settings]
    assert {options["seed"] for options in sources} == {5}, "the recipe's own seed goes with the plan's"


def test_any_option_of_the_plan_can_be_varied() -> None:
    """By its name on the command line, with values as they are typed there."""
    wanted: dict[str, list[Any]] = {
        "dni.form=linear,mlp": ["linear", "mlp"],
        "dni.every=1,4": [1, 4],
        "dni.rows=0.5,1": [0.5, 1.0],
        "targets=true,mixed": ["true", "mixed"],
        "optimizer.lr=1e-3,0.01": [1e-3, 0.01],
        "optimizer.rule=sgd,adamw": ["sgd", "adamw"],
        "sizes=1 3,2 2": [(1, 3), (2, 2)],
        "hop_steps=0,0.5": [0.0, 0.5],
        "channel.wire-dtype=None,bf16": [None, "bf16"],
        "until=accuracy=0.9,None": ["accuracy=0.9", None],
    }
    parsed = parse("mine.py", [], SweepOptions, "freewheel sweep", writes=False)
    for axis, values in zip(read_axes("mine.py", parsed, list(wanted)), wanted.values(), strict=True):
        (option,) = axis.options
        assert [value_of(with_value(parsed, option, value), option) for (value,) in axis.values] == values
    names = set(option_types("mine.py"))
    assert {"stages", "mode", "steps", "dni.hidden", "channel.slots", "width", "batch_norm"} <= names
    assert not names & {"seed", "threads", "emulate", "dni.factory"}


def test_options_of_the_recipe_can_be_varied_and_tied_to_others() -> None:
    grid = _grid("--vary layers,stages=3,4 --vary batch-norm=true,false")
    found = [(dict(s.source.options), s.plan) for s in grid.settings]
    assert [(o["layers"], o["batch_norm"], p.stages) for o, p in found] == [
        (3, True, 3),
        (3, False, 3),
        (4, True, 4),
        (4, False, 4),
    ]
    assert _labels(grid)[1] == "layers,stages 3, no batch-norm"


def test_rows_are_options_under_a_name_and_go_with_everything_else() -> None:
    grid = _grid("--row 'mine:' --row 'cDNI: --dni.form linear --targets true' --vary stages=2,3")
    assert _labels(grid) == ["mine, stages 2", "mine, stages 3", "cDNI, stages 2", "cDNI, stages 3"]
    assert [(s.plan.dni.form, s.plan.targets) for s in grid.settings[1:3]] == [
        ("auto", "bootstrap"),
        ("linear", "true"),
    ]


def test_an_exact_mode_is_run_once_for_all_splits_and_delays() -> None:
    """And so is a single stage, in any mode: both are backpropagation."""
    grid = _grid("--vary mode=naive,1f1b,unlocked --vary stages=1,2,4 --vary hop-steps=0,8")
    keys = [_keys(setting) for setting in grid.settings]
    assert len(grid.settings) == 18
    assert all(each == keys[0] for each in keys[:12]), "naive and 1f1b without microbatches"
    assert keys[12:14] == [keys[0]] * 2, "unlocked, one stage"
    assert len({tuple(each) for each in keys[14:]}) == 4
    assert [setting.backprop for setting in grid.settings] == [True] * 14 + [False] * 4


def test_what_delays_do_not_change_is_run_once_for_all_of_them() -> None:
    """Asynchronous 1F1B waits for late gradients, unless it keeps more batches open; in mode local there are none."""
    rows = (
        "--row 'waits: --mode async-1f1b' --row 'full: --mode async-1f1b --in-flight full' --row 'local: --mode local'"
    )
    settings = _grid(f"{rows} --vary hop-steps=0,2,8").settings
    keys = [_keys(setting)[0] for setting in settings]
    assert len(set(keys[:4])) == 1, "and without a delay there is nothing to keep full"
    assert len({*keys[3:6]}) == 3
    assert len(set(keys[6:])) == 1
    with pytest.raises(PlanError, match="hop-steps has no effect here: 0, 8 are one and the same run; leave it out"):
        _grid("--mode local --vary hop-steps=0,8")


def test_rounding_on_the_way_makes_the_split_matter() -> None:
    grid = _grid("--mode naive --vary stages=2,4 --channel.wire-dtype bf16")
    assert len(grid.points) == 6
    assert not any(setting.backprop for setting in grid.settings)


def test_an_option_without_effect_in_some_mode_is_left_at_its_default_there() -> None:
    grid = _grid("--vary mode=naive,unlocked --vary dni.form=mlp,label_residual --dni.hidden 64 --quality-every 5")
    plans = [setting.plan for setting in grid.settings]
    assert plans[0].dni == plans[1].dni == Plan().dni
    assert [plan.quality_every for plan in plans] == [None, None, 5, 5]
    assert [plan.dni.hidden for plan in plans[2:]] == [64, Plan().dni.hidden]


def test_quality_is_sampled_without_being_asked_for() -> None:
    naive, unlocked = _grid("--vary mode=naive,unlocked --steps 400").settings
    assert (naive.plan.quality_every, unlocked.plan.quality_every) == (None, 20)


# ---------------------------------------------------------------- what cannot be


@pytest.mark.usefixtures("starts_nothing")
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--vary hopsteps=1,2", "unknown option in vary 'hopsteps'; did you mean 'hop-steps'? Valid: width, layers, "),
        ("--vary dni.fom=mlp", "unknown option in vary 'dni.fom'; did you mean 'dni.form'?"),
        ("--vary stages", "vary 'stages': give an option and its values, e.g. hop-steps=0,1,4."),
        ("--vary stages=1,,2", "vary 'stages=1,,2': give an option and its values, e.g. hop-steps=0,1,4."),
        ("--vary stages=2,2", "vary 'stages=2,2' gives a value twice: leave one of them out."),
        ("--vary stages=2 --vary stages=3", "stages is varied twice: give all its values in one --vary."),
        ("--vary batch-norm=yes", "vary batch-norm: 'yes' is neither true nor false."),
        ("--vary seed=0,1", "vary: seeds are given with --seeds, e.g. --seeds 0,1,2."),
        ("--vary threads=1,2", "vary: threads has no effect in the reference driver: leave it out."),
        ("--stall-after-s 9", "stall_after_s has no effect in freewheel sweep, which chooses it: leave it out."),
        ("--no-spans", "spans has no effect in freewheel sweep, which chooses it: leave it out."),
        ("--seeds 1,1", "seeds is '1,1': give different whole numbers, at least 0, with commas, e.g. 0,1,2."),
        ("--jobs 0", "jobs is 0: it must be at least 1."),
        ("--preset hosp", "unknown preset 'hosp'; did you mean 'hops'? Valid: stages, "),
        ("--row linear", "row 'linear': give every row a name of its own, e.g. 'cDNI: --dni.form linear'."),
        ("--row 'a: --stages 3' --vary stages=2,3", "row a gives stages, which is varied too: leave it out of one"),
        ("--row 'a: --jobs 3'", "row a gives jobs, which is one for the whole sweep: give it outside."),
        ("--row 'a: --seed 3'", "row a: seeds are given with --seeds, e.g. --seeds 0,1,2."),
        ("--vary mode=unlocked,unlokced", "mode unlokced: unknown mode 'unlokced'; did you mean 'unlocked'?"),
        ("--vary stages=2,9", "stages 9: 9 stages for 4 layers: every stage needs a layer; use --stages 4 or fewer."),
        ("--mode naive --vary stages=2,9", "stages 9: 9 stages for 4 layers"),
        ("--mode naive --vary hop-steps=0,8", "hop-steps has no effect here: 0, 8 are one and the same run; leave it"),
        ("--mode naive --dni.rows 0.5", "dni has no effect with mode naive: leave it out, or choose mode unlocked."),
        ("--vary mode=naive,local --targets true", "targets has no effect with mode naive: leave it out"),
        (
            "--row 'a: --mode naive --dni.hidden 9' --row 'b: --dni.form mlp --dni.hidden 9'",
            "row a: dni has no effect with mode naive: leave it out, or choose mode unlocked.",
        ),
    ],
)
def test_a_mistake_is_said_before_anything_starts(typed: str, message: str, tmp_path: Path) -> None:
    ended = freewheel("sweep", "mine.py", *shlex.split(typed))
    assert ended.refusals[0].startswith(f"freewheel: {message}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("starts_nothing")
def test_all_points_that_cannot_run_are_named() -> None:
    lines = freewheel("sweep", "mine.py", "--vary", "stages=2,5,6", "--vary", "mode=unlocked,nave").refusals
    assert [line.partition(": ")[2].partition(": ")[0] for line in lines] == [
        "stages 2, mode nave",
        "stages 5, mode unlocked",
        "stages 5, mode nave",
        "stages 6, mode unlocked",
        "stages 6, mode nave",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_run(name: str) -> None:
    """What is typed besides comes on top."""
    layers = [] if "layers" in PRESETS[name] else ["--layers", "6"]
    arguments = with_preset(["--steps", "7", "--preset", name, "--seeds", "0", *layers])
    grid = _grid(shlex.join(arguments))
    assert len(grid.settings) >= 4
    assert {setting.plan.steps for setting in grid.settings} == {7}


# ---------------------------------------------------------------- what is remembered


def test_a_point_is_remembered_by_all_its_settings(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, other, wider = (
        next(iter(_grid(typed).points.values())) for typed in ("", "--optimizer.lr 0.002", "--width 7")
    )
    assert len({first.key, other.key, wider.key}) == 3
    assert store.find(first) is None
    outcome = Outcome(loss=0.5, accuracy=0.9, batches=20, evaluations=((20, 0.5, 0.9),), flops=({"dni": 1.0},))
    store.put(first, outcome)
    assert Store(tmp_path).find(first) == outcome
    assert store.find(other) is None
    assert [path.name for path in store.folder.iterdir()] == [f"{first.key}.json"]


@pytest.mark.parametrize("half", ["", "{", '{"key": "x"}', "[1, 2]", "cut"])
def test_a_half_written_file_does_not_count(half: str, tmp_path: Path) -> None:
    store, (point, *_) = Store(tmp_path), _grid("").points.values()
    store.put(point, Outcome(loss=0.5))
    path = store.folder / f"{point.key}.json"
    path.write_text(path.read_text()[:-30] if half == "cut" else half)
    assert store.find(point) is None
    assert not store.outdated(point)


def test_a_point_of_other_code_is_run_again(tmp_path: Path, recipe_file: Path) -> None:
    store, (point, *_) = Store(tmp_path), _grid("").points.values()
    store.put(point, Outcome(loss=0.5))
    path = store.folder / f"{point.key}.json"
    path.write_text(re.sub(r'"code": "\w+"', '"code": "0123"', path.read_text()))
    assert store.find(point) is None
    assert store.outdated(point)


def test_the_code_that_counts_is_that_of_all_rooms() -> None:
    """Once only the files directly in pipeline/ counted, and a point outlived a change of what a stage does."""
    names = {path.name for path in followed("mine.py")}
    assert {"stage.py", "runner.py", "loss_model.py", "digits.py", "mine.py"} <= names


# ---------------------------------------------------------------- a run


def test_a_point_records_what_the_reference_driver_gives() -> None:
    source = NamedRecipe("mine.py", (("seed", 4),))
    plan = Plan(stages=3, steps=40, seed=4, evaluate_every=20, quality_every=4, hop_steps=1.0)
    outcome, truth = run_point(source, plan), run_reference(source(), plan)
    scores = [(updates, scores.loss(), scores.accuracy()) for updates, scores in truth.scores]
    assert list(outcome.evaluations) == scores
    assert (outcome.loss, outcome.accuracy) == scores[-1][1:]
    assert outcome.train_loss == pytest.approx(sum(truth.losses[-4:]) / 4)
    assert [(cut.stage, cut.samples) for cut in outcome.quality] == [(0, 5), (1, 5)]
    assert all(abs(cut.cosine) <= 1 and cut.norm_ratio > 0 for cut in outcome.quality)
    assert [flops["dni"] > 0 for flops in outcome.flops] == [True, True, False]
    dni, rest = (sum(f[name] for f in outcome.flops[:2]) for name in ("dni", "forward"))
    assert outcome.dni_share is not None
    assert dni / rest > outcome.dni_share > 0


def test_a_run_that_diverges_is_a_finding_and_one_that_fails_is_not() -> None:
    source, plan = NamedRecipe("mine.py"), Plan(steps=20)
    diverged = run_point(source, replace(plan, optimizer=replace(plan.optimizer, rule="sgd", lr=1e9)))
    assert diverged.diverged is not None
    assert re.match(r"stage \d.*, batch \d+: ", diverged.diverged)
    assert (diverged.loss, diverged.accuracy) == (None, None)
    with pytest.raises(StageError, match="stage 0, layer DNI, batch 0: ValueError: _Wrong"):
        run_point(source, replace(plan, dni=replace(plan.dni, factory=_Wrong)))


class _Wrong(nn.Module):
    """A DNI whose prediction has the wrong shape."""

    def __init__(self, cut: object) -> None:
        super().__init__()

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        """Half of it."""
        return h[:, :1]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """Twelve settings with two seeds, run once for all tests."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "mine.py").write_text(RECIPE)
    return freewheel("sweep", folder / "mine.py", *_TYPED, "--runs", folder / "runs", columns=100), folder


_TYPED = shlex.split("--vary mode=naive,unlocked,async-1f1b --vary hop-steps=0,3 --steps 30 --seeds 0,1 --jobs 2")


def _content(folder: Path) -> Any:
    return _loads((folder / "runs" / "mine-sweep-mode-hop-steps" / "sweep.json").read_text())


@pytest.mark.processes
def test_the_first_screen_says_what_will_run_and_the_last_what_came_out(swept: tuple[Ended, Path]) -> None:
    ended, folder = swept
    assert (ended.status, ended.err) == (0, "")
    first, _, rest = ended.out.partition("\n")
    assert first == ("mine: sweep of 6 settings (3 x 2) with 2 seeds each in the reference driver, 30 batches of 16")
    assert "  to run     8  (0 of 8 are there; 2 at a time)" in rest
    assert "  runs       8, not 12  (" in rest
    assert len(re.findall(r"^ +\d+/8  ", rest, re.MULTILINE)) == 8
    verdict = _content(folder)["verdict"]
    assert re.match(r"Best: .*, [\d.]+ % \([\d.]+ to [\d.]+, 2 seeds\)\.", verdict)
    assert verdict in rest
    to_copy = ("  folder ", "  results ", "  pictures ", "  next: ", "  runs ", "Best: ")
    wide = [line for line in rest.splitlines() if len(line.rstrip()) > 100 and not line.startswith(to_copy)]
    assert wide == []


@pytest.mark.processes
def test_sweep_json_has_a_figure_for_every_setting_and_seed(swept: tuple[Ended, Path]) -> None:
    _, folder = swept
    content = _content(folder)
    assert [axis["name"] for axis in content["axes"]] == ["mode", "hop-steps"]
    settings = content["settings"]
    assert [each["setting"] for each in settings] == [
        {"mode": mode, "hop-steps": hop} for mode in ("naive", "unlocked", "async-1f1b") for hop in ("0", "3")
    ]
    for each in settings:
        runs = each["runs"]
        errors = [100 * (1 - run["accuracy"]) for run in runs]
        assert each["error"]["mean"] == pytest.approx(sum(errors) / 2)
        assert (each["error"]["min"], each["error"]["max"]) == (min(errors), max(errors))
        assert [run["seed"] for run in runs] == [0, 1]
        assert all(run["batches"] == 30 and run["loss"] > 0 and run["seconds"] > 0 for run in runs)
    naive, unlocked = settings[0], settings[3]
    assert naive["backprop"]
    assert naive["above_backprop"] is None
    assert unlocked["above_backprop"]["mean"] == pytest.approx(unlocked["error"]["mean"] - naive["error"]["mean"])
    assert naive["runs"][0]["quality"] == []
    assert unlocked["runs"][0]["quality"][0]["samples"] > 0


@pytest.mark.processes
def test_runs_in_processes_equal_runs_here(swept: tuple[Ended, Path]) -> None:
    _, folder = swept
    run = _content(folder)["settings"][3]["runs"][1]
    source = NamedRecipe(str(folder / "mine.py"), (("seed", 1),))
    here = run_point(source, Plan(stages=2, steps=30, seed=1, hop_steps=3.0, quality_every=1, balance="layers"))
    assert (run["loss"], run["accuracy"], run["train_loss"]) == (here.loss, here.accuracy, here.train_loss)


@pytest.mark.processes
def test_a_second_call_runs_nothing_and_a_third_only_what_is_new(
    swept: tuple[Ended, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = swept
    points = folder / "runs" / "mine-sweep-mode-hop-steps" / "points"
    before = {path.name: path.stat().st_mtime_ns for path in points.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(BaseProcess, "start", lambda process: pytest.fail("a process was started"))
        again = freewheel("sweep", folder / "mine.py", *_TYPED, "--runs", folder / "runs")
    assert again.status == 0
    assert "  to run     0  (8 of 8 are there; 1 at a time)" in again.out
    more = freewheel("sweep", folder / "mine.py", *_TYPED, "--seeds", "0,1,2", "--runs", folder / "runs")
    assert "  to run     4  (8 of 12 are there; 2 at a time)" in more.out
    assert "  next: freewheel train " in more.out, "three seeds and backpropagation: enough to try it"
    after = {path.name: path.stat().st_mtime_ns for path in points.iterdir()}
    assert len(after) == 12
    assert before.items() <= after.items()


def test_results_of_another_command_in_the_same_folder_are_kept(tmp_path: Path) -> None:
    commands = [["sweep", "a"], ["sweep", "a"], ["sweep", "b"], ["sweep", "c"]]
    for command in commands:
        keep_aside(tmp_path, command)
        (tmp_path / "sweep.json").write_text(json.dumps({"command": command}))
        (tmp_path / "sweep.png").write_text(command[1])
    there = {path.name: path.read_text() for path in tmp_path.glob("sweep*")}
    assert sorted(there) == [f"sweep{n}.{end}" for n in ("-1", "-2", "") for end in ("json", "png")]
    assert [there[f"sweep{n}.png"] for n in ("-1", "-2", "")] == ["a", "b", "c"]


@pytest.mark.processes
def test_the_command_that_is_shown_next_can_be_typed(swept: tuple[Ended, Path], tmp_path: Path) -> None:
    shown = shlex.split(swept[0].out.split("next: ")[1].split("  (")[0])
    assert shown[-2:] == ["--seeds", "0,1,2"], "two seeds are few"
    assert shown.count("--seeds") == 1
    without = freewheel("sweep", "mine.py", "--steps", "4", "--seeds", "0", "--hop-steps", "1", "--dni.rows", "0.5")
    command = shlex.split(without.out.split("next: ")[1].split("  (")[0])
    assert command[-2:] == ["--vary", "mode=unlocked,naive"], "a figure needs a yardstick"
    last = freewheel(*command[1:], "--seeds", "0,1,2")
    train = shlex.split(last.out.split("next: ")[1].split("  (")[0])
    assert train[:3] == ["freewheel", "train", "mine.py"]
    plan = parse("mine.py", train[3:], TrainOptions, "freewheel train").plan
    assert (plan.steps, plan.dni.rows, plan.hop_steps) == (4, 0.5, 0.0)


@pytest.mark.processes
def test_the_picture_has_a_curve_per_mode_over_the_numbers(swept: tuple[Ended, Path]) -> None:
    _, folder = swept
    grid = _grid(shlex.join(_TYPED), str(folder / "mine.py"))
    across = abscissa_of(grid)
    assert across is not None
    assert (across.name, across.numbers) == ("hop-steps", (0.0, 3.0))
    store = Store(folder / "runs" / "mine-sweep-mode-hop-steps")
    outcomes = {key: found for key, point in grid.points.items() if (found := store.find(point))}
    curves = sweep_curves(grid, findings_of(grid, outcomes))
    assert [(curve.name, curve.at, curve.kind) for curve in curves] == [
        ("naive", (0.0, 3.0), "backprop"),
        ("unlocked", (0.0, 3.0), "unlocked"),
        ("async-1f1b", (0.0, 3.0), ""),
    ]
    assert all(low <= mean <= high for c in curves for low, mean, high in zip(c.low, c.middle, c.high, strict=True))
    png = (folder / "runs" / "mine-sweep-mode-hop-steps" / "sweep.png").read_bytes()
    assert struct.unpack(">I", png[16:20]) == (1200,)


# ---------------------------------------------------------------- runs that end badly


@pytest.mark.processes
def test_ctrl_c_leaves_what_is_finished(tmp_path: Path) -> None:
    """The run of seed 1 interrupts the driver from within: by then that of seed 0 is over."""
    command = ["sweep", "mine.py", "--steps", "3", "--jobs", "1", "--name", "s"]
    ended = freewheel(*command, "--trouble", "interrupts")
    assert ended.status == 130
    assert "  1 of 3 points are there; the same command goes on from here" in ended.out
    assert len(list((tmp_path / "runs" / "s" / "points").glob("*.json"))) == 1


@pytest.mark.processes
@pytest.mark.parametrize(
    ("trouble", "options", "message"),
    [
        ("dies", [], r"the run \(pid \d+\) was killed by SIGKILL; look at the system's log"),
        ("fails", [], "ZeroDivisionError: as planned"),
        ("hangs", ["--seeds", "1", "--within-s", "0.5"], r"did not end within 0\.5 s: give it longer with --within-s"),
    ],
)
def test_a_run_that_breaks_costs_nobody_else_anything(
    trouble: str, options: list[str], message: str, tmp_path: Path
) -> None:
    ended = freewheel("sweep", "mine.py", "--steps", "3", "--name", "s", "--trouble", trouble, *options)
    assert ended.status == 1
    assert re.search(rf"freewheel: .*seed 1: .*{message}.*; the same command runs it again", ended.err)
    finished = list((tmp_path / "runs" / "s" / "points").glob("*.json"))
    assert len(finished) == (0 if trouble == "hangs" else 2)


# ---------------------------------------------------------------- what it says


def _found(typed: str, **errors: list[float | None]) -> tuple[Grid, Any]:
    """Findings with these errors in % for the seeds of the settings of a mode."""
    grid = _grid(typed)
    outcomes = {}
    for setting in grid.settings:
        for error, point in zip(errors[setting.labels[0].replace("-", "_")], setting.points.values(), strict=True):
            outcomes[point.key] = (
                Outcome(diverged="x") if error is None else Outcome(accuracy=1 - error / 100, loss=1.0)
            )
    return grid, findings_of(grid, outcomes)


def test_the_verdict_names_the_best_and_its_distance_from_backpropagation() -> None:
    grid, found = _found(
        "--vary mode=naive,unlocked,local --seeds 0,1", naive=[2.0, 2.2], unlocked=[1.8, 1.9], local=[3.0, 5.0]
    )
    assert verdict_of(grid, found) == (
        "Best: unlocked, 1.85 % (1.80 to 1.90, 2 seeds). It is 0.25 points below backpropagation (-0.30 to -0.20)."
    )
    grid, found = _found("--vary mode=naive,unlocked,local --seeds 0", naive=[2.0], unlocked=[2.5], local=[None])
    assert verdict_of(grid, found) == (
        "Best: naive (backpropagation), 2.00 % (1 seed). The best of the others, unlocked, 2.50 % (1 seed), is 0.50 "
        "points above backpropagation. Diverged: local (1 of 1 seeds)."
    )


def test_a_setting_of_which_a_seed_diverged_is_never_the_best() -> None:
    grid, found = _found("--vary mode=local,unlocked --seeds 0,1", unlocked=[9.0, 9.0], local=[0.1, None])
    assert verdict_of(grid, found) == (
        "Best: unlocked, 9.00 % (9.00 to 9.00, 2 seeds). Diverged: local (1 of 2 seeds)."
    )
    (lost,) = [curve for curve in sweep_curves(grid, found) if curve.lost]
    assert (lost.name, lost.at, lost.lost) == ("the run", (1.0,), (0.0,))


def test_backpropagation_is_that_of_the_same_network() -> None:
    """Not the best of all: a wider network is another problem."""
    grid = _grid("--vary mode=naive,unlocked --vary width=4,8 --seeds 0")
    errors = dict(zip(_labels(grid), (5.0, 1.0, 6.0, 1.5), strict=True))
    outcomes = {
        point.key: Outcome(accuracy=1 - errors[label_of(grid, setting)] / 100, loss=1.0)
        for setting in grid.settings
        for point in setting.points.values()
    }
    above = [list(finding.above.values()) for finding in findings_of(grid, outcomes)]
    assert above == [[], [], [pytest.approx(1.0)], [pytest.approx(0.5)]]


def test_it_uses_the_cores_it_may_use() -> None:
    assert SweepOptions().num_jobs == len(os.sched_getaffinity(0))
    assert SweepOptions(jobs=7).num_jobs == 7
