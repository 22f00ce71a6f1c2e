"""The command line: what is wrong is said in one message before anything starts; what is written can be relied on."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.torch import load_file

import launch.on_ray
from launch import cli, train
from launch.options.options import BenchOptions, RunOptions, parse
from launch.recipes import BUILT_IN
from launch.recipes.digits import digits
from launch.results.run_folder import default_name, new_run_dir
from launch.setup.rank import Rank
from launch.setup.recipe_source import _file_entry
from pipeline import Plan, PlanError
from pipeline.data.recipe import build_model
from pipeline.metrics.spans import SPAN_DTYPE, Spans
from pipeline.plan.names import DNI_FORMS, OPTIMIZERS, TARGETS
from pipeline.schedule.modes import MODES
from workers.errors import RunFailed
from workers.files import NotWritten


@dataclass
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def refusals(self) -> list[str]:
        """The messages of a wrong use: nothing on stdout, no traceback, and no process was started."""
        assert self.status == 2, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        return self.err.splitlines()


def freewheel(*arguments: str | Path, columns: int = 250) -> Ended:
    """Run the command in this process, on a wide terminal."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    wide = mock.patch.dict(os.environ, {"COLUMNS": str(columns)})
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), wide, pytest.raises(SystemExit) as ended:
            cli.run_command([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Ended(ended.value.code or 0, out.getvalue(), err.getvalue())  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def starts_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker is started, and no process to compare with."""

    def start(process: BaseProcess) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(BaseProcess, "start", start)


@pytest.fixture
def starts_nothing(starts_no_run: None, empty_folder: Path) -> Iterator[None]:
    """No folder is made either."""
    yield
    assert not (empty_folder / "runs").exists()


@pytest.mark.processes
def test_the_command_starts_without_what_is_slow_to_import() -> None:
    """Torch's compiler alone, which the rivals' schedules bring along, once cost every command, rank and actor 2 s."""
    slow = "'torch._dynamo', 'torch.distributed.pipelining', 'sympy', 'sklearn', 'matplotlib', 'ray'"
    code = f"import sys, launch.cli, launch.on_ray.actor; print(sorted({{{slow}}} & sys.modules.keys()))"
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# ---------------------------------------------------------------- wrong use


def test_without_arguments_the_usage_is_shown() -> None:
    ended = freewheel()
    assert ended.refusals[0] == "usage: freewheel COMMAND RECIPE [options]"


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("train", "--help"), ("bench", "-h")], ids=" ".join)
def test_help_names_commands_and_recipes(arguments: tuple[str, ...]) -> None:
    ended = freewheel(*arguments)
    assert (ended.status, ended.err) == (0, "")
    assert all(word in ended.out for word in ("train", "bench", *BUILT_IN))


@pytest.mark.usefixtures("starts_nothing")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian digits", "freewheel: unknown command 'trian'; did you mean 'train'? Valid: train, bench, sweep."),
        ("train", f"freewheel: train needs a recipe: {', '.join(BUILT_IN)}, or the path of a .py file."),
        ("bench --steps 3", f"freewheel: bench needs a recipe: {', '.join(BUILT_IN)}, or the path of a .py file."),
        (
            "train digts",
            f"freewheel: unknown recipe 'digts'; did you mean 'digits'? Valid: {', '.join(BUILT_IN)}, "
            "or the path of a .py file.",
        ),
        ("train digits --mode unloked", "freewheel: unknown mode 'unloked'; did you mean 'unlocked'? Valid: "),
        ("train digits --targets boostrap", "freewheel: unknown targets 'boostrap'; did you mean 'bootstrap'? Valid: "),
        ("train digits --dni.form linaer", "freewheel: unknown DNI form 'linaer'; did you mean 'linear'? Valid: "),
        ("bench digits --optimizer.rule sdg", "freewheel: unknown optimizer 'sdg'; did you mean 'sgd'? Valid: "),
        (
            "train digits --sizes 1 2",
            "freewheel: sizes 1 2 add up to 3, but the model has 6 layers: 0, 1, 2, 3, 4, 5.",
        ),
        (
            "train digits --sizes 1 2 1",
            "freewheel: sizes has 3 numbers for 2 stages: give one number of layers per stage.",
        ),
        ("train digits --sizes 0 4", "freewheel: sizes 0 4: every stage needs at least one layer."),
        ("train digits --cuts 7", "freewheel: unknown layer in cuts '7'; Valid: 0, 1, 2, 3, 4, 5."),
        (
            "train digits --stages 9",
            "freewheel: 9 stages for 6 layers: every stage needs a layer; use --stages 6 or fewer.",
        ),
        ("train digits --batch 2000", "freewheel: batch is 2000: give 1 to 1347, the rows of the data."),
        ("train missing.py", "freewheel: no recipe file "),
        ("train mnist --data nowhere", "freewheel: no train-images-idx3-ubyte (or train-images-idx3-ubyte.gz) in "),
        ("train chargpt --data nowhere", "freewheel: nowhere cannot be read as text: "),
    ],
)
def test_a_mistake_is_one_sentence_with_the_remedy(command: str, message: str) -> None:
    (line,) = freewheel(*command.split()).refusals
    assert line.startswith(message)
    assert line.endswith((".", "--data."))


@pytest.mark.usefixtures("starts_nothing")
def test_all_mistakes_of_a_plan_come_at_once() -> None:
    command = "train digits --mode naive --targets true --stages 0 --optimizer.momentum 0.9 --name a/b --json a/b"
    assert freewheel(*command.split()).refusals == [
        "freewheel: stages is 0: it must be a whole number, at least 1.",
        "freewheel: targets has no effect with mode naive: leave it out, or choose mode unlocked.",
        "freewheel: optimizer.momentum has no effect with adam: leave it out, or choose sgd or nadamw.",
        "freewheel: name is 'a/b': it names a folder inside the folder of the runs; give a word without / and \\.",
        "freewheel: json a/b: there is no folder a; make it first, or give another path.",
    ]


@pytest.mark.usefixtures("starts_nothing")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train digits --mdoe naive", ["--mdoe", "--mode", "Who may update when"]),
        ("train digits --hiden 3", ["--hiden", "--hidden", "Units per hidden layer"]),
        ("bench digits --round 2", ["--round", "--rounds"]),
        ("train digits extra", ["extra"]),
        ("train digits --steps many", ["--steps", "many"]),
        ("train digits --steps", ["--steps"]),
        ("train digits --balance tme", ["--balance", "tme", "time", "layers"]),
        ("train mnist", ["--data", "train-images-idx3-ubyte"]),
        ("bench channel --sizes 3", ["--sizes"]),
    ],
)
def test_an_option_that_is_wrong_is_named_with_what_would_be_right(command: str, words: list[str]) -> None:
    message = "\n".join(freewheel(*command.split()).refusals)
    assert [word for word in words if word not in message] == []


@pytest.mark.usefixtures("starts_nothing")
def test_too_little_shared_memory_is_said_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "workers.channels.shm.host_memory.os.statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096)
    )
    (line,) = freewheel("train", "digits", "--stages", "2").refusals
    assert re.fullmatch(
        r"freewheel: too little shared memory: the channels need [\d.]+ MiB \([\d,]+ bytes\), "
        r"0\.0 MiB \(12,288 bytes\) are free in /dev/shm\. Use fewer slots, a smaller batch, "
        r"or a bigger /dev/shm \(.*\)\.",
        line,
    )


@pytest.mark.usefixtures("starts_nothing")
def test_a_folder_that_cannot_be_made_is_refused(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_folder / "file").write_text("no folder")
    monkeypatch.setattr(cli, "run", lambda source, resolved, runs, *rest: new_run_dir(runs, "r"))
    (line,) = freewheel("train", "digits", "--runs", "file/runs", "--quiet").refusals
    assert line == (
        "freewheel: cannot make a folder for the run in file/runs: Not a directory; choose another with --runs."
    )


@pytest.mark.usefixtures("starts_nothing")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train digits --json nowhere/result.json", "json nowhere/result.json: there is no folder nowhere; make it"),
        ("train digits --json .", "json . is a folder: give the path of a file."),
        ("bench digits --json nowhere/bench.json", "json nowhere/bench.json: there is no folder nowhere; make it"),
        ("bench channel --json nowhere/rows.json", "json nowhere/rows.json: there is no folder nowhere; make it"),
        ("bench channel --rounds 0", "rounds is 0: it must be at least 1."),
        ("bench channel --slots 0", "slots is 0: it must be at least 1."),
        ("bench digits --rounds 0", "rounds is 0: it must be at least 1."),
        ("bench digits --steps 1", "steps is 1: bench needs at least 2, the first one warms up."),
        ("bench digits --mode naive", "mode has no effect in freewheel bench, which chooses it: leave it out."),
        ("bench digits --mode=naive", "mode has no effect in freewheel bench, which chooses it: leave it out."),
        ("bench digits --microbatches 4", "microbatches has no effect in freewheel bench, which chooses it: "),
        ("train digits --hop-steps 2", "hop_steps has no effect in processes without deterministic: leave it out"),
        ("train digits --name ../up", "name is '../up': it names a folder inside the folder of the runs"),
        ("train digits --name=", "name is '': it names a folder inside the folder of the runs"),
        ("bench digits --over-stages 2 0", "over_stages has 0: every one must be at least 1."),
        ("bench digits --over-latency-ms 5 -1", "over_latency_ms has -1: every one must be at least 0."),
        (
            "bench digits --over-stages 2 --over-latency-ms 5",
            "over_stages and over_latency_ms are both given: compare over one of them at a time.",
        ),
        ("bench digits --name ..", "name is '..': it names a folder inside the folder of the runs"),
        ("train digits --hidden 0", "hidden is 0: it must be a whole number, at least 1."),
        ("train digits --dni.form linear --dni.hidden 64", "dni.hidden has no effect with the DNI form linear: leave"),
        ("train digits --launcher ray --address nowhere", "address is 'nowhere': give auto, local, or HOST:PORT"),
        ("train digits --launcher ray --address ray://a:10001", "address is ray://a:10001: through Ray Client the "),
        ("train digits --address local", "address has no effect with launcher local: add --launcher ray, or leave"),
        ("train digits --ray.cpus 2", "the options of ray have no effect with launcher local: add --launcher ray, or"),
        ("train digits --launcher ray --ray.cpus 0", "ray.cpus is 0: it must be more than 0."),
        ("train digits --launcher ray --ray.resources b", "ray.resources has 'b': write NAME=AMOUNT, an amount above "),
        ("train digits --launcher ray --ray.resources GPU=1", "ray.resources has GPU, which is none of a cluster's "),
        ("bench digits --address=auto", "address has no effect with launcher local: add --launcher ray, or leave it "),
        ("bench digits --launcher ray --over-stages 3", "over_stages cannot be had with launcher ray, which reserves "),
        ("bench channel --ray.cpus 1", "ray.cpus: bench channel measures a hop on this host: leave it out."),
    ],
)
def test_what_can_be_known_before_a_run_is_said_before_it(command: str, message: str) -> None:
    """Otherwise it is found after the last batch, or never."""
    (line,) = freewheel(*command.split()).refusals
    assert line.startswith(f"freewheel: {message}")
    assert line.endswith(".")


@pytest.mark.usefixtures("starts_nothing")
def test_without_the_package_ray_its_launcher_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its options are understood all the same."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "launch.on_ray.cluster", raising=False)
    monkeypatch.delattr(launch.on_ray, "cluster", raising=False)
    (line,) = freewheel("train", "digits", "--launcher", "ray", "--address", "auto", "--ray.cpus", "2").refusals
    assert line.startswith("freewheel: launcher ray needs the package ray, 2.59 or newer, which is not there (")
    assert line.endswith("): pip install 'freewheel[ray]'.")


_MODEL = "def model():\n    return torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
_BATCHES = "def batches(i):\n    return torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)\n"


@pytest.mark.usefixtures("starts_nothing")
@pytest.mark.parametrize("command", ["train", "bench"])
@pytest.mark.parametrize(
    ("functions", "sentence"),
    [
        (
            "def model():\n    return nowhere()\n" + _BATCHES,
            "model() raises NameError: name 'nowhere' is not defined (mine.py:4, in model): mend it there.",
        ),
        (
            "def model():\n    raise SystemExit(3)\n" + _BATCHES,
            "model() raises SystemExit: 3 (mine.py:4, in model): mend it there.",
        ),
        (
            _MODEL + "def batches(i):\n    return [(torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))][i]\n",
            "batches(1) raises IndexError: list index out of range (mine.py:6, in batches): mend it there.",
        ),
        (
            _MODEL + _BATCHES + "def evaluation():\n    yield batches(0)\n    open('/no/such/file')\n",
            "evaluation() raises FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file' "
            "(mine.py:9, in evaluation): mend it there.",
        ),
        (
            _MODEL + _BATCHES + "def loss(output, labels):\n    return nowhere()\n",
            "the loss does not take output [8, 3] torch.float32 and labels [8] torch.int64: give labels of the shape "
            "it needs (name 'nowhere' is not defined) (mine.py:8, in loss).",
        ),
        ("raise SystemExit(3)", "{folder}/mine.py cannot be imported: SystemExit: 3 (mine.py:3, in <module>)"),
        (
            "def recipe():\n    return {}['size']\n",
            "recipe() raises KeyError: 'size' (mine.py:4, in recipe): mend it there.",
        ),
    ],
    ids=["model", "exit", "batches", "evaluation", "loss", "import", "recipe"],
)
def test_what_the_users_own_code_raises_is_one_line_with_its_place(
    functions: str, sentence: str, command: str, empty_folder: Path
) -> None:
    """It was a traceback of thirty lines, most of them ours; of an exit in the model there was no word at all."""
    loss = "import torch\nfrom torch.nn.functional import cross_entropy as loss\n"
    (empty_folder / "mine.py").write_text(loss + functions)
    _file_entry.cache_clear()
    (line,) = freewheel(command, "mine.py", "--stages", "1", "--steps", "4").refusals
    assert line == f"freewheel: {sentence.format(folder=empty_folder) if '{folder}' in sentence else sentence}"


@pytest.mark.usefixtures("starts_nothing")
def test_the_part_of_a_traceback_that_is_the_users_follows(empty_folder: Path) -> None:
    lines = [
        "import torch",
        "def loss(o, l): return o.sum()",
        "def inner(): return 1 / 0",
        "def model():",
        "    inner()",
    ]
    (empty_folder / "mine.py").write_text("\n".join(lines) + "\n" + _BATCHES)
    _file_entry.cache_clear()
    line, *rest = freewheel("train", "mine.py", "--steps", "4").refusals
    assert line.startswith("freewheel: model() raises ZeroDivisionError: division by zero (mine.py:3, in inner): ")
    assert [one for one in rest if one.startswith("  File")] == [
        f'  File "{empty_folder}/mine.py", line 5, in model',
        f'  File "{empty_folder}/mine.py", line 3, in inner',
    ]


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("name", BUILT_IN)
def test_help_of_a_recipe_lists_its_own_options_and_those_of_the_plan(name: str) -> None:
    ended = freewheel("train", name, "--help")
    assert (ended.status, ended.err) == (0, "")
    own = {"digits": "--hidden", "mnist": "--batch-norm", "cnn": "--width", "chargpt": "--context", "mlp": "--layers"}
    plan = ("--stages", "--mode", "--steps", "--seed", "--optimizer.lr", "--dni.form", "--channel.slots", "--sizes")
    run = ("--runs", "--name", "--json", "--quiet")
    assert [option for option in (own[name], *plan, *run) if option not in ended.out] == []
    assert "Seconds without any progress" in ended.out, "with an explanation"
    assert "--rounds" not in ended.out
    assert "--rounds" in freewheel("bench", name, "--help").out


@pytest.mark.parametrize(
    ("option", "valid"),
    [("--mode", MODES), ("--targets", TARGETS), ("--optimizer.rule", OPTIMIZERS), ("--dni.form", DNI_FORMS)],
)
def test_help_lists_what_an_option_can_be(option: str, valid: Iterable[str]) -> None:
    assert f"{option} {{{','.join(valid)}}}" in freewheel("train", "digits", "--help").out


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["train", "bench", "sweep"])
def test_help_breaks_where_the_terminal_ends_not_where_the_source_does(command: str, columns: int) -> None:
    """Each line but the last of a description has no room for the first word of the next."""
    out = freewheel(command, "digits", "--help", columns=columns).out
    lines = [line[1:].rstrip(" |") for line in out.splitlines() if line.strip()]  # with a border or without
    (begin,) = (line.index("show this help") for line in lines if "show this help" in line)
    goes_on = [
        (line, after)
        for line, after in itertools.pairwise(lines)
        if line[begin:] and line[:begin].endswith("  ") and not after[:begin].strip()
    ]
    assert len(goes_on) > 20
    assert [line for line, after in goes_on if len(line) + 1 + len(after.split()[0]) < columns - 4] == []


def test_help_of_a_benchmark_offers_no_mode() -> None:
    """It compares modes; the suggestion of a user's file does not count either."""
    out = freewheel("bench", "digits", "--help").out
    assert "--mode" not in out
    assert "--microbatches" not in out


def test_a_benchmark_is_unlocked_whatever_the_file_suggests(empty_folder: Path) -> None:
    (empty_folder / "mine.py").write_text(MINE.replace("steps=12", "steps=12, mode='gpipe', microbatches=4"))
    assert parse("mine.py", [], RunOptions, "freewheel train").plan.mode == "gpipe"
    plan = parse("mine.py", [], BenchOptions, "freewheel bench").plan
    assert (plan.mode, plan.microbatches, plan.steps) == ("unlocked", 1, 12)


def test_an_option_without_a_type_has_that_of_its_default(empty_folder: Path) -> None:
    """It was once left out of the help, and could not be given."""
    (empty_folder / "mine.py").write_text(MINE.replace("width: int = 4", "width=4, code=None, **others"))
    parsed = parse("mine.py", ["--width", "5"], RunOptions, "freewheel train")
    assert dict(parsed.source.options) == {"width": 5, "code": None}


@pytest.mark.usefixtures("starts_nothing")
def test_an_option_of_a_recipe_that_is_taken_is_refused(empty_folder: Path) -> None:
    (empty_folder / "mine.py").write_text(MINE.replace("width: int = 4", "width: int = 4, steps: int = 3"))
    (line,) = freewheel("train", "mine.py").refusals
    assert line == "freewheel: recipe() in mine.py has parameters that Freewheel has too: rename steps."


def test_help_of_a_users_file_lists_its_options_with_their_explanation(empty_folder: Path) -> None:
    (empty_folder / "mine.py").write_text(MINE)
    ended = freewheel("train", "mine.py", "--help")
    assert ended.status == 0
    assert "A recipe of my own." in ended.out
    assert "--width" in ended.out
    assert "How wide it is." in ended.out
    assert "(default: 3)" in next(line for line in ended.out.splitlines() if "Number of stages" in line)


MINE = '''
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from pipeline import Plan, Recipe

plan = Plan(stages=3, steps=12)

def _model():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

def _batches(step):
    rows = 8 if step != 7 else 5
    return torch.ones(rows, 4), torch.zeros(rows, dtype=torch.int64)

def recipe(width: int = 4) -> Recipe:
    """A recipe of my own.

    Args:
        width: How wide it is.
    """
    return Recipe(name="mine", model=_model, batches=_batches, loss=cross_entropy)
'''


# ---------------------------------------------------------------- what comes next


@pytest.mark.parametrize(
    ("typed", "left"),
    [
        ("--mode naive --steps 9 --name a --json=b", "--steps 9"),
        ("--mode=naive --name=a --steps=9 --quiet", "--steps=9 --quiet"),
        ("--mode gpipe --microbatches 4 --sizes 3 3", "--sizes 3 3"),
        ("--mode local --dni.hidden 64 --dni.lr=0.1", ""),
        ("--dni.form mlp --dni.hidden 64", "--dni.form mlp --dni.hidden 64"),
        ("--steps 1 --stages 3", "--stages 3"),
        ("--runs mode --name --json", "--runs mode"),
    ],
)
def test_the_next_command_leaves_out_what_bench_refuses(typed: str, left: str) -> None:
    plan = Plan(mode=(re.findall(r"--mode[ =](\S+)", typed) or ["unlocked"])[0])
    command, why = cli._after_training("digits", typed.split(), plan, steps=1 if "--steps 1" in typed else 9)
    assert command == f"freewheel bench digits {left}".rstrip()
    assert plan.mode in why


@pytest.mark.parametrize(
    ("typed", "rank", "command"),
    [
        ("--launcher ray --address auto --name a", None, "freewheel bench digits --launcher ray --address auto"),
        ("--steps 9", Rank(0, 2, 1, "h", 1, ""), "torchrun --nproc-per-node 2 -m freewheel bench digits --steps 9"),
        ("", Rank(0, 4, 2, "h", 1, ""), "torchrun --nnodes 2 --nproc-per-node 2 -m freewheel bench digits"),
    ],
)
def test_the_next_command_is_started_as_the_run_was(typed: str, rank: Rank | None, command: str) -> None:
    """Else it measures another setup."""
    shown, why = cli._after_training("digits", typed.split(), Plan(), 9, rank)
    assert shown == command
    assert ("by which the hosts of this run met" in why) == (rank is not None and rank.nodes > 1)


# ---------------------------------------------------------------- runs that end badly


def test_an_interrupted_run_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", run)
    ended = freewheel("train", "digits", "--quiet")
    assert (ended.status, ended.err) == (130, "freewheel: interrupted; all workers were stopped\n")


def test_a_failed_run_ends_with_1_and_shows_the_cause_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> None:
        raise RunFailed("stage 1, layer 5, batch 3: as planned (pid 7)", stage=1, details="Traceback [of] the worker\n")

    monkeypatch.setattr(cli, "run", run)
    ended = freewheel("train", "digits", "--quiet")
    assert ended.status == 1
    assert ended.err == "Traceback [of] the worker\nfreewheel: stage 1, layer 5, batch 3: as planned (pid 7)\n"


def test_a_file_that_cannot_be_written_is_one_line_after_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []

    def run(*arguments: object) -> None:
        error = NotWritten(Path("runs/r/result.json"), "No space left on device")
        error.result = "what came out"
        raise error

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(cli.Console, "finished", lambda console, result: shown.append(result))
    ended = freewheel("train", "digits", "--quiet")
    line = (
        "freewheel: cannot write runs/r/result.json: No space left on device; make room there, or give another place\n"
    )
    assert (ended.status, ended.err, shown) == (1, line, ["what came out"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_result_that_cannot_be_written_where_json_says_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run", lambda *_: SimpleNamespace(as_dict=dict))
    monkeypatch.setattr(cli.Console, "finished", lambda console, result: None)
    ended = freewheel("train", "digits", "--quiet", "--json", "/dev/full")
    assert ended.status == 1
    assert ended.err == (
        "freewheel: cannot write /dev/full: No space left on device; make room there, or give another place\n"
    )


@pytest.mark.processes
def test_a_batch_of_another_size_in_the_middle_ends_the_run_with_its_id(empty_folder: Path) -> None:
    """The file's own plan is the default: three stages, twelve batches. Quiet is quiet."""
    (empty_folder / "mine.py").write_text(MINE)
    ended = freewheel("train", "mine.py", "--quiet", "--name", "bad")
    assert (ended.status, ended.out) == (1, "")
    (last,) = ended.err.splitlines()  # none of the user's code failed: there is nothing to see in a traceback
    assert last.startswith("freewheel: stage 0: batch 7 has inputs [5, 4] torch.float32, batch 0 has [8, 4]")
    assert last.endswith(f"; all of it: {empty_folder}/runs/bad/failure.txt")
    assert "batch 7 has inputs" in (empty_folder / "runs" / "bad" / "failure.txt").read_text()
    assert json.loads((empty_folder / "runs" / "bad" / "plan.json").read_text())["plan"]["stages"] == 3


# ---------------------------------------------------------------- a run


@dataclass
class Trained:
    """One real run, looked at from several sides."""

    ended: Ended
    runs: Path
    json: Path
    typed: list[str]

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.runs / "mine-2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """60 batches of digits in two stages, into ``mine``, where something precious lies already."""
    folder = tmp_path_factory.mktemp("trained")
    runs, file = folder / "runs", folder / "result.json"
    (runs / "mine").mkdir(parents=True)
    (runs / "mine" / "plan.json").write_text("precious")
    command = f"train digits --steps 60 --stages 2 --evaluate-every 30 --name mine --runs {runs} --json {file}"
    return Trained(freewheel(*command.split()), runs, file, ["freewheel", *command.split()])


@pytest.mark.processes
def test_both_screens_fit_into_80_columns(tmp_path: Path) -> None:
    """Nothing is cut off, and what somebody may copy is never broken."""
    runs = tmp_path / ("a folder with a [long] name" * 4)
    command = ["train", "digits", "--steps", "12", "--stages", "3", "--targets", "mixed", "--runs", runs, "--name", "r"]
    ended = freewheel(*command, columns=80)
    assert ended.status == 0, ended.err
    lines = [line.rstrip() for line in ended.out.splitlines()]
    to_copy = [line for line in lines if str(tmp_path) in line]
    assert [line for line in lines if len(line) > 80 and line not in to_copy] == []
    assert "…" not in ended.out
    assert [str(runs) in line for line in to_copy] == [True] * 3, "where it runs, where it lies, and what is next"
    assert to_copy[2].startswith("  next: freewheel bench digits ")
    reason = next(index for index, line in enumerate(lines) if line.startswith("  DNI"))
    assert lines[reason + 1].startswith(" " * lines[reason].index("(")), "a long reason goes on under itself"
    assert any(line.startswith("age: ") for line in lines), "the columns of the table are explained"


def _loads(text: str) -> Any:
    """Strict JSON: NaN and Infinity are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.processes
def test_a_run_succeeds_and_tells_what_came_out(trained: Trained) -> None:
    assert (trained.ended.status, trained.ended.err) == (0, "")
    out = trained.ended.out
    assert "digits: unlocked, 2 stages, 60 batches of 128" in out
    assert "(measured time per layer)" in out, "every automatic choice comes with its reason"
    assert "loss_model" in out
    assert re.search(r"unlocked, 2 stages, 60 batches of 128: loss \d\.\d+, accuracy \d+\.\d+%", out)
    assert "samples/s" in out


@pytest.mark.processes
def test_nothing_is_overwritten(trained: Trained) -> None:
    assert (trained.runs / "mine" / "plan.json").read_text() == "precious"
    assert sorted(path.name for path in trained.runs.iterdir()) == ["mine", "mine-2"]


@pytest.mark.processes
def test_the_command_that_is_shown_next_can_be_typed(trained: Trained) -> None:
    command = shlex.split(trained.ended.out.split("next: ")[1].split("  (")[0])
    assert command[:3] == ["freewheel", "bench", "digits"]
    parsed = parse(command[2], command[3:], BenchOptions, "freewheel bench")
    assert (parsed.plan.steps, parsed.plan.stages) == (60, 2)
    assert (parsed.run.name, parsed.run.json) == (None, None), "it does not write over what this run wrote"


@pytest.mark.processes
def test_result_json(trained: Trained) -> None:
    result = _loads(trained.json.read_text())
    assert _loads((trained.folder / "result.json").read_text()) == result
    assert (result["schema"], result["mode"], result["stages"]) == (1, "unlocked", 2)
    assert (result["steps"], result["samples"]) == (60, 60 * 128)
    for name in ("loss", "accuracy", "samples_per_s", "seconds"):
        assert isinstance(result[name], float), name
        assert result[name] > 0
    assert result["accuracy"] <= 1
    assert Path(result["run"]) == trained.folder
    assert sum(result["sizes"]) == 6
    (down, nothing_down), (nothing_up, up) = (result["bytes_moved"][f"{way}_bytes_per_batch"] for way in ("down", "up"))
    assert (nothing_down, nothing_up) == (0, 0), "nothing is below the first stage or above the last"
    assert down - 4 * up == 128 * 8, "a label goes down with every row, a gradient comes back for every fourth batch"
    assert up % (64 * 4) == 0, "floats"
    assert [depth is None for depth in result["queue_depth"]["max"]] == [True, False]


@pytest.mark.processes
def test_plan_json_is_the_resolved_plan(trained: Trained) -> None:
    content = _loads((trained.folder / "plan.json").read_text())
    assert content["recipe"] == "digits"
    assert content["command"] == trained.typed, "not the arguments of the program around it"
    plan = content["plan"]
    assert (plan["steps"], plan["stages"], plan["mode"], plan["evaluate_every"]) == (60, 2, "unlocked", 30)
    assert sum(plan["sizes"]) == len(content["layers"]) == len(content["layer_parameters"]) == 6
    assert all(seconds > 0 for seconds in content["layer_seconds"])
    assert {decided["what"] for decided in content["decided"]} >= {"split", "DNI"}
    assert all(decided["why"] for decided in content["decided"])


@pytest.mark.processes
def test_metrics_can_be_read_line_by_line(trained: Trained) -> None:
    lines = [_loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["event"] == "train"]
    evaluation = [line for line in lines if line["event"] == "evaluation"]
    assert train[-1]["step"] == 60
    assert all(line["samples"] == line["step"] * 128 and line["loss"] > 0 for line in train)
    assert [line["step"] for line in evaluation] == [30, 60]
    assert all(0 <= line["accuracy"] <= 1 for line in evaluation)
    assert [line["time_ns"] for line in lines] == sorted(line["time_ns"] for line in lines)
    assert evaluation[-1]["loss"] == _loads(trained.json.read_text())["loss"]


@pytest.mark.processes
def test_spans_load_without_pickle(trained: Trained) -> None:
    paths = sorted((trained.folder / "spans").iterdir())
    assert [path.name for path in paths] == ["stage-0.npy", "stage-1.npy"]
    for path in paths:
        records = np.load(path, allow_pickle=False)
        assert records.dtype == SPAN_DTYPE
        assert np.all(np.diff(records["start_ns"]) >= 0)
        assert len(Spans(records).update_latencies_s()) == 60


@pytest.mark.processes
def test_the_weights_load_into_the_plain_model_strictly(trained: Trained) -> None:
    build_model(digits(), seed=1).load_state_dict(load_file(trained.folder / "model.safetensors"), strict=True)
    assert (trained.folder / "optimizer.safetensors").is_file()
    assert not (trained.folder / "parts").exists(), "the workers' parts are joined"


@pytest.mark.parametrize("recipe", ["a/b", "../up", "c:\\d", "with spaces\n", ""])
def test_any_name_of_a_recipe_gives_a_folder_of_its_own(recipe: str, tmp_path: Path) -> None:
    made = new_run_dir(tmp_path, default_name(recipe, "naive"))
    assert made.parent == tmp_path
    assert made.name.endswith("-naive")
    assert not set(made.name) & set("/\\ \n:")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\\b", "\0"])
def test_a_run_stays_in_the_folder_of_the_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="it names a folder inside the folder of the runs"):
        new_run_dir(tmp_path / "runs", name)
    with pytest.raises(PlanError, match="it names a folder inside the folder of the runs"):
        train(model=_unused, batches=[], loss=_unused, plan=Plan(steps=1), name=name)
    assert not (tmp_path / "runs").exists()


def _unused(*arguments: object) -> Any:
    raise AssertionError("refused before")


def test_new_run_dir_counts_up(tmp_path: Path) -> None:
    made = [new_run_dir(tmp_path / "a" / "b", "r") for _ in range(3)]
    assert [path.name for path in made] == ["r", "r-2", "r-3"]
    assert all(path.is_dir() for path in made)


# ---------------------------------------------------------------- a benchmark


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, dict[str, Any]]:
    """One round of everything, and its bench.json."""
    folder = tmp_path_factory.mktemp("benched")
    command = f"bench digits --steps 40 --rounds 1 --stages 2 --runs {folder / 'runs'} --json {folder / 'bench.json'}"
    ended = freewheel(*command.split())
    assert ended.status == 0, ended.err
    return ended, _loads((folder / "bench.json").read_text())


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _spread(value: Any) -> bool:
    return (
        set(value) == {"median", "min", "max"}
        and all(map(_number, value.values()))
        and 0 < value["min"] <= value["median"] <= value["max"]
    )


def _pair(*names: str) -> Callable[[Any], bool]:
    return lambda value: set(value) == set(names) and all(_number(value[name]) and value[name] >= 0 for name in names)


def _shares(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_number(share) and 0 <= share <= 1 for share in value)


def _depths(value: Any) -> bool:
    first, *others = zip(value["median"], value["max"], strict=True)
    return first == (None, None) and all(0 <= median <= largest for median, largest in others)


def _moved(value: Any) -> bool:
    names = {"down_bytes_per_batch", "up_bytes_per_batch", "down_mb_per_s", "up_mb_per_s"}
    return set(value) == names and all(_number(each) and each >= 0 for entries in value.values() for each in entries)


def _ledger(value: Any) -> bool:
    names = ("forward", "backward", "dni", "relay", "communication", "waiting")
    seconds = [value[f"{name}_s"] for name in names]
    operations = [value[f"{name}_flop"] for name in names]
    return all(map(_number, seconds)) and all(entry is None or _number(entry) for entry in operations)


# field -> (what it is, whether null is allowed: a field that does not apply is null)
ROW: dict[str, tuple[Callable[[Any], bool], bool]] = {
    "engine": ({"single", "ddp", "torch", "freewheel"}.__contains__, False),
    "mode": (lambda value: isinstance(value, str) and bool(value), False),
    "stages": (_count, False),
    "threads": (_count, False),
    "microbatches": (_count, True),
    "emulated": (lambda value: isinstance(value, bool), False),
    "launcher": ({"local", "torchrun", "ray"}.__contains__, False),
    "samples_per_s": (_spread, False),
    "speedup": (_spread, False),
    "update_latency_s": (_pair("p50", "p99"), True),
    "gradient_age_updates": (_pair("p50", "max"), True),
    "gradient_age_s": (_pair("p50", "max"), True),
    "queue_depth": (_depths, True),
    "bytes_moved": (_moved, True),
    "busy_share": (_shares, True),
    "bubble_share": (_shares, True),
    "dni_share": (_shares, True),
    "peak_memory_bytes": (lambda value: bool(value) and all(map(_count, value)), True),
    "ledger": (_ledger, True),
    "loss": (_number, False),
    "accuracy": (lambda value: _number(value) and 0 <= value <= 1, True),
    "until_s": (_number, True),
    "until_samples": (_number, True),
}


def _row(bench: dict[str, Any], engine: str, mode: str) -> dict[str, Any]:
    (row,) = (r for r in bench["rows"] if (r["engine"], r["mode"], r["threads"]) == (engine, mode, 1))
    return dict(row)


@pytest.mark.processes
def test_bench_json_has_every_field_with_its_type(benched: tuple[Ended, dict[str, Any]]) -> None:
    _, bench = benched
    assert bench["schema"] == 1
    assert bench["command"][:3] == ["freewheel", "bench", "digits"]
    assert (bench["over_stages"], bench["over_latency_ms"]) == (None, None)
    assert {"python", "torch", "cores", "processor"} <= bench["environment"].keys()
    for row in bench["rows"]:
        assert ROW.keys() <= row.keys()
        wrong = {
            name: row[name]
            for name, (fits, nullable) in ROW.items()
            if not (nullable if row[name] is None else fits(row[name]))
        }
        assert wrong == {}, f"{row['engine']} {row['mode']}"


@pytest.mark.processes
def test_a_benchmark_compares_one_process_with_stages_locked_and_unlocked(
    benched: tuple[Ended, dict[str, Any]],
) -> None:
    _, bench = benched
    single, naive = _row(bench, "single", "backprop"), _row(bench, "freewheel", "naive")
    unlocked = _row(bench, "freewheel", "unlocked")
    assert bench["rows"][0] == single
    assert single["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert (single["stages"], single["update_latency_s"], single["busy_share"]) == (1, None, None)
    for row in (naive, unlocked):
        assert row["stages"] == len(row["busy_share"]) == len(row["dni_share"]) == len(row["peak_memory_bytes"]) == 2
        shares = zip(row["busy_share"], row["bubble_share"], strict=True)
        assert [busy + bubble for busy, bubble in shares] == pytest.approx([1.0, 1.0])
        assert row["update_latency_s"] is not None
        assert row["ledger"] is not None
    assert naive["gradient_age_updates"] is None, "locked: nothing comes late"
    assert unlocked["gradient_age_updates"]["max"] >= unlocked["gradient_age_updates"]["p50"] >= 1
    assert naive["dni_share"] == [0.0, 0.0]
    assert unlocked["dni_share"][0] > 0
    assert unlocked["gradient_age_s"]["max"] >= unlocked["gradient_age_s"]["p50"] > 0
    assert naive["loss"] == pytest.approx(single["loss"], rel=1e-4), "equal work: locked training is exact"
    assert naive["accuracy"] == pytest.approx(single["accuracy"], abs=0.005)


@pytest.mark.processes
def test_the_verdict_comes_before_the_figures(benched: tuple[Ended, dict[str, Any]]) -> None:
    ended, bench = benched
    assert re.search(r"\d+\.\d\dx \(\d+\.\d\d to \d+\.\d\d\) the .*locked", bench["verdict"])
    assert bench["verdict"].endswith(".")
    assert bench["verdict"] in " ".join(ended.out.split())
    assert ended.out.index(bench["verdict"][:40]) < ended.out.index("one process  ")
    assert ended.err == ""


@pytest.mark.parametrize("rows", ["", " --rows naive unlocked"])
def test_the_next_command_of_a_benchmark_names_its_rows_once(rows: str) -> None:
    asked = f"freewheel bench digits{rows} --rounds 3".split()
    assert cli._with_all_rows(asked) == ["freewheel", "bench", "digits", "--rounds", "3", "--rows", "all"]


@pytest.mark.processes
def test_the_folder_of_a_benchmark_has_its_json_and_its_pictures(benched: tuple[Ended, dict[str, Any]]) -> None:
    ended, bench = benched
    (folder,) = Path(bench["command"][bench["command"].index("--runs") + 1]).iterdir()
    assert _loads((folder / "bench.json").read_text()) == bench
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "bench.json",
        "throughput.png",
        "timeline.png",
    }
    assert f"  pictures   throughput.png, timeline.png  (in {folder})" in ended.out


@pytest.mark.processes
def test_a_comparison_over_the_latency_of_a_link_fits_into_100_columns(tmp_path: Path) -> None:
    command = "bench mlp --layers 2 --hidden 8 --batch 8 --steps 4 --rounds 1 --emulate stage_ms=1"
    ended = freewheel(*command.split(), "--over-latency-ms", "3", "--json", "sweep.json", columns=100)
    assert (ended.status, ended.err) == (0, "")
    points = _loads((tmp_path / "sweep.json").read_text())["over_latency_ms"]
    assert [point["latency_ms"] for point in points] == [0, 3], "the plan itself has no link: 0"
    assert "hop ms mode" in ended.out
    to_copy = ("  run ", "  pictures ", "  next: ")
    lines = [line.rstrip() for line in ended.out.splitlines() if not line.startswith(to_copy)]
    assert [line for line in lines if len(line) > 100 or "…" in line] == []
