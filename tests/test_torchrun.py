"""``torchrun ... -m launch train``: real torchrun processes, the numbers of local workers, failures told once."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from oracle import assert_same
from safetensors.torch import load_file
from torchrun_program import HERE, Torchrun, torchrun

from launch import cli
from launch.options.options import Parsed
from launch.ranks.torchrun import _parsed, _parsed_for_bench
from launch.recipes.digits import digits
from launch.setup.rank import Rank
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import Plan, PlanError

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]
HOST = socket.gethostname()


def _failed(program: Torchrun) -> tuple[str, list[str]]:
    """What a run that failed wrote to stdout, and Freewheel's own lines on stderr. All its ranks end by themselves:
    torchrun kills who has not ended 30 s after its SIGTERM, and says so.
    """
    status, out, err = program.ended()
    assert "forcefully" not in err
    assert status != 0
    return out, [line for line in err.splitlines() if line.startswith("freewheel: ")]


@pytest.mark.parametrize(("sizes", "channels"), [((3, 3), "auto"), ((2, 2, 2), "gloo")])
def test_locked_training_equals_local_workers_bit_for_bit(
    sizes: tuple[int, ...], channels: str, tmp_path: Path
) -> None:
    plan = Plan(mode="naive", stages=len(sizes), sizes=sizes, steps=12)
    source = partial(digits, hidden=32)
    local = run(source, resolve_source(source, plan), tmp_path, "local", Console(quiet=True), ["test"])
    typed = f"train digits --hidden 32 --mode naive --sizes {' '.join(map(str, sizes))} --steps 12 --name r --runs . "
    with torchrun(typed + f"--channels {channels} --json r.json", tmp_path, ranks=len(sizes)) as program:
        status, out, err = program.ended()
    assert status == 0, err
    assert_same(load_file(tmp_path / "r" / "model.safetensors"), local.state_tensors())
    assert_same(load_file(tmp_path / "r" / "optimizer.safetensors"), local.optimizer_tensors())
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["launcher"], result["accuracy"]) == ("torchrun", local.accuracy)
    assert json.loads((tmp_path / "r" / "plan.json").read_text())["launcher"] == "torchrun"
    reason = "shared memory, 4 slots  (all workers on this host" if channels == "auto" else "gloo, 4 slots  (as asked"
    assert f"  channels   {reason}" in out
    assert out.count("digits: naive") == 1, "one rank speaks"
    assert "freewheel" not in err
    assert len(list((tmp_path / "r" / "spans").iterdir())) == len(sizes)
    assert not (tmp_path / "r" / "parts").exists()


def test_a_warm_up_equals_local_workers_and_its_end_is_told(tmp_path: Path) -> None:
    plan = Plan(stages=2, sizes=(3, 3), steps=12, warmup_steps=7, deterministic=True)
    source = partial(digits, hidden=32)
    local = run(source, resolve_source(source, plan), tmp_path, "local", Console(quiet=True), ["test"])
    typed = "train digits --hidden 32 --sizes 3 3 --steps 12 --warmup-steps 7 --deterministic --name r --runs ."
    with torchrun(f"{typed} --json r.json", tmp_path, ranks=2) as program:
        status, out, err = program.ended()
    assert status == 0, err
    assert_same(load_file(tmp_path / "r" / "model.safetensors"), local.state_tensors())
    (switch,) = json.loads((tmp_path / "r.json").read_text())["switches"]
    assert (switch["stage"], switch["batch"], switch["locked"]) == (0, 7, False)
    assert "  stage 0 unlocked at batch 7 (the warm-up is over)" in out
    assert "  stage 0: unlocked for 42% of the batches, 1 switch" in out


def test_unlocked_training_learns_and_ends_at_its_goal(tmp_path: Path) -> None:
    """The threads are the plan's, whatever torchrun's OMP_NUM_THREADS; stages are as many as ranks.

    Without spans: the file that rank 1 then does not write once kept its last word from the driver.
    """
    typed = "train digits --hidden 128 --until accuracy=0.9 --steps 2000 --threads 2 --no-spans --name r --runs ."
    with torchrun(typed, tmp_path) as program:
        status, out, err = program.ended()
    assert status == 0, err
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["stages"] == 2
    assert result["until_samples"] is not None
    assert result["accuracy"] >= 0.7, "it was at 0.9; batches under way move it after that"
    assert result["steps"] < 2000
    assert "threads    2 per worker" in out


def test_what_cannot_run_is_said_once_before_anything_starts(tmp_path: Path) -> None:
    with torchrun("train digits --stages 3 --runs .", tmp_path) as program:
        status, out, err = program.ended()
    (line,) = [line for line in err.splitlines() if line.startswith("freewheel: ")]
    assert line == (
        "freewheel: 3 stages for 2 ranks of torchrun: every rank runs one stage; start 3 ranks (--nproc-per-node times "
        "--nnodes), or give --stages 2."
    )
    assert status != 0
    assert "exitcode  : 2" in err
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("parsed", "arguments", "message"),
    [
        (_parsed, "--sizes 1 2 3", "sizes has 3 numbers for 2 stages: give one number of layers per stage."),
        (_parsed, "--launcher ray --ray.cpus=2", "launcher, ray.cpus: torchrun starts the ranks, one per stage: leave"),
        (_parsed_for_bench, "--stages 3", "3 stages for 2 ranks of torchrun: every rank runs one stage; start 3 ranks"),
        (
            _parsed_for_bench,
            "--over-stages 2 3",
            "over_stages cannot be had under torchrun, where every rank runs one stage: leave it out.",
        ),
    ],
)
def test_what_has_no_place_under_torchrun_is_refused(
    parsed: Callable[[Rank, str, list[str]], Parsed], arguments: str, message: str
) -> None:
    """How it is told, the test before this one shows."""
    with pytest.raises(PlanError, match=f"^{re.escape(message)}"):
        parsed(Rank(0, 2, 1, "a", 1, ""), "digits", arguments.split())


def test_a_channel_is_not_measured_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rank, "current", lambda: Rank(0, 2, 1, "a", 1, ""))
    with pytest.raises(PlanError, match=r"^bench channel measures a hop on this host: start it without torchrun\.$"):
        cli._command(["bench", "channel"])


def test_a_recipe_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    with torchrun(f"train {HERE / 'different.py'} --runs .", tmp_path) as program:
        status, _, err = program.ended()
    lines = [line for line in err.splitlines() if line.startswith("freewheel: ")]
    assert lines[0] == (
        f"freewheel: rank 1 on {HOST}: its list of layers and their parameters is 0 (117), 1 (0), 2 (50), that of "
        "rank 0 0 (104), 1 (0), 2 (45): give all ranks the same command, recipe and data."
    )
    assert all(line.startswith(f"freewheel: rank 1 on {HOST}: its ") for line in lines)
    assert status != 0
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- failures


def test_an_exception_in_a_layer_travels_whole_and_is_told_once(tmp_path: Path) -> None:
    with torchrun(f"train {HERE / 'failing.py'} --runs . --name r", tmp_path) as program:
        status, _, err = program.ended()
    assert status != 0
    (line,) = [line for line in err.splitlines() if line.startswith("freewheel: ")]
    assert line.startswith("freewheel: stage 1, layer 5, batch 5: ZeroDivisionError: as planned (pid ")
    assert line.endswith(f" on {HOST}); all of it: {tmp_path}/r/failure.txt")
    assert err.count("raise ZeroDivisionError") == 1, "the worker's traceback"
    assert err.index("freewheel: stage 1") < err.index("ChildFailedError"), "ours comes before torchrun's summary"
    assert "as planned" in (tmp_path / "r" / "failure.txt").read_text()


@pytest.mark.parametrize("who", ["worker 1", "rank 1", "rank 0"])
def test_whoever_is_killed_is_named_and_everybody_ends(who: str, tmp_path: Path) -> None:
    what, index = who.split()
    with torchrun(f"train {HERE / 'endless.py'} --runs . --name r", tmp_path) as program:
        program.wait_for("held-out loss")
        victim = getattr(program, what)(int(index))
        victim.kill()
        _, lines = _failed(program)
    if who == "rank 0":  # nobody is left to report but the other ranks, if torchrun lets them
        assert all(line.startswith(f"freewheel: rank 1 on {HOST}: the driver (rank 0) is gone") for line in lines)
        return
    (line,) = lines
    if who == "worker 1":
        assert line.startswith(f"freewheel: stage 1 (pid {victim.pid} on {HOST}) was killed by SIGKILL, ")
    else:
        assert line.startswith(f"freewheel: stage 1: rank 1 (pid {victim.pid} on {HOST}) is gone without a word (")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_torchrun_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    with torchrun(f"train {HERE / 'endless.py'} --runs . --name r", tmp_path) as program:
        program.wait_for("held-out loss")
        program.process.send_signal(number)
        _, lines = _failed(program)
    assert lines == ["freewheel: interrupted; all workers were stopped"]


def test_a_stopped_worker_is_reported_with_the_stacks_of_the_others(tmp_path: Path) -> None:
    with torchrun(f"train {HERE / 'endless.py'} --stall-after-s 3 --runs . --name r", tmp_path) as program:
        program.wait_for("held-out loss")
        program.worker(0).send_signal(signal.SIGSTOP)
        status, _, err = program.ended()
    assert status != 0
    (line,) = [line for line in err.splitlines() if line.startswith("freewheel: ")]
    assert line.startswith("freewheel: no progress for 3.0 s: stage 0 (pid ")
    assert "the process is stopped" in line
    assert "  stage 1  waits  wait " in err
    assert "worker/main.py" in (tmp_path / "r" / "stacks-1.txt").read_text(), "stage 1 sent its stacks over the wire"


def test_replicas_under_torchrun_equal_local_workers_bit_for_bit(tmp_path: Path) -> None:
    """Two ranks for two replicas, without a word about stages; averages over gloo here, in shared memory there."""
    plan = Plan(mode="naive", stages=1, replicas=2, steps=8)
    source = partial(digits, hidden=32)
    local = run(source, resolve_source(source, plan), tmp_path, "local", Console(quiet=True), ["test"])
    typed = "train digits --hidden 32 --mode naive --steps 8 --replicas 2 --channels gloo --name r --runs ."
    with torchrun(typed, tmp_path, ranks=2) as program:
        status, _, err = program.ended()
    assert status == 0, err
    assert_same(load_file(tmp_path / "r" / "model.safetensors"), local.state_tensors())
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert (result["stages"], result["replicas"], result["samples"]) == (1, 2, local.samples)
    assert result["accuracy"] == local.accuracy
    assert {path.name for path in (tmp_path / "r" / "spans").iterdir()} == {"stage-0.npy", "replica-1-stage-0.npy"}
