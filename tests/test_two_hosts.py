"""torchrun on two hosts that share neither memory nor a clock nor, as far as Freewheel goes, a disk."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from oracle import assert_same
from safetensors.torch import load_file
from torchrun_program import HERE, Program, Torchrun, torchrun
from two_hosts import CLOCK_AHEAD_S, Host, NoNamespacesError, two_hosts

from launch.recipes.digits import digits
from launch.results.run_folder import read_spans
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import Plan

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Host a and host b."""
    try:
        with two_hosts() as both:
            yield both
    except NoNamespacesError as error:
        pytest.skip(str(error))


_MEET: dict[str, Callable[[Host, int], list[str]]] = {
    "static": lambda first, k: [f"--node-rank={k}", f"--master-addr={first.address}", "--master-port=29517"],
    "c10d": lambda first, k: [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={first.name}:29518",
        "--rdzv-id=tests",
    ],
}


@contextlib.contextmanager
def _on_both(
    hosts: tuple[Host, Host], arguments: str, folder: Path, ranks: tuple[int, int] = (1, 1), meet: str = "static"
) -> Iterator[tuple[Torchrun, Torchrun]]:
    """torchrun on both, each in a folder of its own; they meet at host a, in one of torchrun's two ways."""
    with contextlib.ExitStack() as stack:
        programs = []
        for k, (host, here) in enumerate(zip(hosts, ranks, strict=True)):
            (folder / host.name).mkdir()
            options = ["--nnodes=2", *_MEET[meet](hosts[0], k)]
            how = {"ranks": here, "options": options, "prefix": host.prefix}
            programs.append(stack.enter_context(torchrun(arguments, folder / host.name, **how)))
        yield programs[0], programs[1]


def test_two_hosts_train_over_gloo_and_equal_one(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Three stages, two on host a: one cut in shared memory, the other between the hosts."""
    sizes = (2, 2, 2)
    plan = Plan(mode="naive", stages=3, sizes=sizes, steps=12)
    source = partial(digits, hidden=32)
    local = run(source, resolve_source(source, plan), tmp_path, "local", Console(quiet=True), ["test"])
    typed = "train digits --hidden 32 --mode naive --sizes 2 2 2 --steps 12 --name r --runs ."
    with _on_both(hosts, typed, tmp_path, ranks=(2, 1)) as (a, b):
        status, out, err = a.ended()
        other = b.ended()
    assert status == 0, err + other[2]
    assert other[:2] == (0, "")
    folder = tmp_path / "host-a" / "r"
    assert_same(load_file(folder / "model.safetensors"), local.state_tensors())
    assert_same(load_file(folder / "optimizer.safetensors"), local.optimizer_tensors())
    cuts = json.loads((folder / "plan.json").read_text())["channels"]
    assert [(cut["kind"], cut["why"]) for cut in cuts] == [
        ("shm", "both workers on one host"),
        ("gloo", "host-a and host-b are two hosts"),
    ]
    assert "0-1 shared memory, 1-2 gloo" in out
    assert not list((tmp_path / "host-b").iterdir()), "everything lies where rank 0 is"
    spans = read_spans(folder)
    begin, end = max(int(s.start_ns[0]) for s in spans), min(int(s.end_ns[-1]) for s in spans)
    assert begin < end, "the spans of all stages overlap: they are on one clock"


def test_unlocked_training_between_two_hosts_learns(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    typed = "train digits --hidden 128 --until accuracy=0.9 --steps 2000 --name r --runs ."
    with _on_both(hosts, typed, tmp_path, meet="c10d") as both:
        ended = [program.ended() for program in both]
    assert [status for status, _, _ in ended] == [0, 0], ended
    (driver,) = [host for host in hosts if (tmp_path / host.name / "r").is_dir()]  # c10d chooses who is rank 0
    result = json.loads((tmp_path / driver.name / "r" / "result.json").read_text())
    assert result["until_samples"] is not None, "it was at 0.9 when it stopped; batches under way move it after that"
    assert result["accuracy"] >= 0.7
    assert result["steps"] < 2000
    assert 0 < result["seconds"] < CLOCK_AHEAD_S / 2, "on one clock"


def test_a_transformer_trains_between_two_hosts_to_the_end(
    hosts: tuple[Host, Host], data_dir: Path, tmp_path: Path
) -> None:
    tiny = "--width 16 --blocks 2 --heads 2 --context 16 --batch 8 --steps 100 --optimizer.lr 0.01"
    typed = f"train chargpt --data {data_dir / 'tinyshakespeare.txt'} {tiny} --name r --runs ."
    with _on_both(hosts, typed, tmp_path) as both:
        ended = [program.ended() for program in both]
    assert [status for status, _, _ in ended] == [0, 0], ended
    result = json.loads((tmp_path / "host-a" / "r" / "result.json").read_text())
    assert (result["steps"], result["mode"], result["launcher"]) == (100, "unlocked", "torchrun")
    assert result["loss"] < math.log(65), "of 65 characters it knows more than that they are equally frequent"


_RAY_PORT = 29519


@contextlib.contextmanager
def _ray_on_both(hosts: tuple[Host, Host], folder: Path) -> Iterator[dict[str, str | None]]:
    """Ray's head on host a and a node on host b, a CPU each, which demand a token; gives a driver's environment."""
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ADDRESS": None}
    env |= {"RAY_worker_niceness": "0", "RAY_prestart_worker_first_driver": "0"}  # as in test_ray
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    start += ["--object-store-memory=80000000"]
    where = f"{hosts[0].address}:{_RAY_PORT}"
    meet = (["--head", f"--port={_RAY_PORT}", "--include-dashboard=false"], [f"--address={where}"])
    files = [tempfile.mkdtemp(prefix="fw-ray-", dir="/tmp") for _ in hosts]  # a socket's path has to be short
    with contextlib.ExitStack() as stack:
        for host, how, own in zip(hosts, meet, files, strict=True):
            stack.callback(shutil.rmtree, own, ignore_errors=True)
            here = [f"--node-ip-address={host.address}", f"--temp-dir={own}"]
            node = Program([*host.prefix, *start, *how, *here], folder, env)
            stack.callback(node.close)
            node.wait_for("Ray runtime started")
        yield env


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the package ray is not installed")
def test_a_ray_cluster_of_two_hosts_trains_to_the_end(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """STRICT_SPREAD proves that two nodes took part: it starts nothing where there is but one."""
    a, b = hosts
    typed = f"train digits --hidden 64 --steps 60 --launcher ray --address {a.address}:{_RAY_PORT} --name r --runs ."
    command = [*a.prefix, sys.executable, "-m", "launch", *typed.split(), "--ray.strategy", "STRICT_SPREAD"]
    with _ray_on_both(hosts, tmp_path) as env:
        driver = Program(command, tmp_path, env)
        try:
            status, out, err = driver.ended()
        finally:
            driver.close()
    assert status == 0, out + err
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert (result["steps"], result["launcher"]) == (60, "ray")
    assert result["accuracy"] > 0.2, "ten digits: it has learned"
    plan = json.loads((tmp_path / "r" / "plan.json").read_text())
    (places,) = (decision["value"] for decision in plan["decided"] if decision["what"] == "ray")
    assert set(re.findall(r"\(([\d.]+)\)", places)) == {a.address, b.address}
    assert [channel["kind"] for channel in plan["channels"]] == ["gloo"]


@pytest.mark.parametrize("what", ["an exception", "a kill", "a rank's kill"])
def test_a_failure_on_the_other_host_is_told_on_the_first(what: str, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    recipe = "failing.py" if what == "an exception" else "endless.py"
    with _on_both(hosts, f"train {HERE / recipe} --name r --runs .", tmp_path) as (a, b):
        if what != "an exception":
            a.wait_for("held-out loss")
            (b.worker(1) if what == "a kill" else b.rank(1)).kill()
        status, _, err = a.ended()
        other = b.ended()
    assert "forcefully" not in err + other[2], "torchrun kills who has not ended 30 s after its SIGTERM, and says so"
    assert status != 0
    assert other[0] != 0
    (line,) = [line for line in (err + other[2]).splitlines() if line.startswith("freewheel: ")]
    expected = {
        "an exception": "stage 1, layer 5, batch 5: ZeroDivisionError: as planned (pid ",
        "a kill": "was killed by SIGKILL",  # and in which batch, if it was in one
        "a rank's kill": "is gone without a word (",
    }
    assert expected[what] in line
    assert "on host-b)" in line


def test_a_cable_that_is_pulled_ends_both_sides(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """No connection breaks, there is only silence: each side notices by itself, long before the stall limit."""
    with _on_both(hosts, f"train {HERE / 'endless.py'} --stall-after-s 100 --name r --runs .", tmp_path) as (a, b):
        a.wait_for("held-out loss")
        with hosts[1].unplugged():
            start = time.monotonic()
            ended = [program.ended() for program in (a, b)]
            seconds = time.monotonic() - start
    (line,) = [line for line in ended[0][2].splitlines() if line.startswith("freewheel: ")]
    assert line.startswith("freewheel: stage 1: rank 1 (pid ")
    assert " on host-b) is gone without a word ([Errno " in line, "timed out, or no route to host"
    (line,) = [line for line in ended[1][2].splitlines() if line.startswith("freewheel: ")]
    assert line.startswith(
        "freewheel: rank 1 on host-b: the driver (rank 0) is gone ([Errno 110] Connection timed out)"
    )
    assert [status for status, _, _ in ended] == [1, 1]
    assert seconds < 100, "not the stall limit"
