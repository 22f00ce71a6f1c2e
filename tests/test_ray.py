"""``--launcher ray``: real Ray, on this host and on clusters of several nodes; failures that name stage and node.

The driver is a program of its own, like a user's. The cluster of several nodes demands a token.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import problems
import psutil
import pytest
from oracle import assert_same
from safetensors.torch import load_file
from torchrun_program import HERE, Program

from launch import ray_launcher
from launch.console import Console
from launch.recipes.digits import digits
from launch.training import resolve_source, run
from pipeline import Plan
from pipeline.spans import Span
from workers import records
from workers.board import Status
from workers.fleet import Fleet

ray = pytest.importorskip("ray", reason="the package ray is not installed: pip install 'freewheel[ray]'")

from ray._private.authentication_test_utils import reset_auth_token_state  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from launch import ray_cluster  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
_ENDLESS = f"train {HERE / 'endless.py'} --mode naive --name r --runs . --launcher ray"
_FORGET: dict[str, str | None] = dict.fromkeys(
    ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """In the place of the one that knows no cluster: no variable of Ray's; the programs look after the rest."""
    before = _ray_variables()
    yield
    assert _ray_variables() == before


@contextmanager
def freewheel(arguments: str, cwd: Path, **env: str | None) -> Iterator[Program]:
    """The command as a program; whatever happens, nobody of it outlives the block."""
    program = Program([sys.executable, "-m", "launch", *arguments.split()], cwd, env)
    try:
        yield program
    finally:
        program.close()


def _ray_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}


def _local_run(sizes: tuple[int, ...], runs: Path) -> Any:
    plan = Plan(mode="naive", stages=len(sizes), sizes=sizes, steps=12)
    source = partial(digits, hidden=32)
    return run(source, resolve_source(source, plan), runs, "local", Console(quiet=True), ["test"])


def _digits(sizes: tuple[int, ...]) -> str:
    split = " ".join(map(str, sizes))
    return f"train digits --hidden 32 --mode naive --stages {len(sizes)} --sizes {split} --steps 12 --name r --runs ."


# ---------------------------------------------------------------- a Ray of the run's own


@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2)])
def test_locked_training_equals_local_workers_bit_for_bit(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """Three stages find room on two cores too. Nothing of Ray is left when the command has ended."""
    local = _local_run(sizes, tmp_path)
    with freewheel(f"{_digits(sizes)} --launcher ray --address local --json r.json", tmp_path) as program:
        status, out, err = program.ended()
    assert status == 0, err
    assert_same(load_file(tmp_path / "r" / "model.safetensors"), local.state_tensors())
    assert_same(load_file(tmp_path / "r" / "optimizer.safetensors"), local.optimizer_tensors())
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["launcher"], result["accuracy"]) == ("ray", local.accuracy)
    assert "shared memory, 4 slots  (all workers on this host" in out
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert {line["event"] for line in lines} == {"train", "evaluation"}
    assert len(list((tmp_path / "r" / "spans").iterdir())) == len(sizes)


def test_unlocked_training_reaches_its_accuracy(tmp_path: Path) -> None:
    typed = "train digits --hidden 128 --stages 2 --until accuracy=0.9 --steps 2000 --name r --runs ."
    with freewheel(f"{typed} --launcher ray --address local", tmp_path) as program:
        status, _, err = program.ended()
    assert status == 0, err
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["until_samples"] is not None
    assert result["accuracy"] >= 0.7, "it was at 0.9; batches under way move it after that"
    assert result["steps"] < 2000


def test_threads_are_the_plans_and_what_a_worker_prints_reaches_the_drivers_console(tmp_path: Path) -> None:
    """Ray would set OMP_NUM_THREADS to the actor's CPUs, which are three here."""
    typed = f"train {HERE / 'ray_threads.py'} --name r --runs . --launcher ray --address local --ray.cpus 3"
    with freewheel(typed, tmp_path) as program:
        status, out, err = program.ended()
    assert status == 0, err
    assert set(re.findall(r"threads \d+ \S+ \S+", out)) == {"threads 2 2 2"}


def test_a_benchmark_runs_its_rows_over_the_actors(tmp_path: Path) -> None:
    """A mode of ours, and a rival whose ranks are children of the same actors; 14 rows make its search short."""
    typed = "bench digits --hidden 32 --batch 14 --stages 2 --rows naive ddp torch-1f1b --steps 6 --rounds 1"
    with freewheel(f"{typed} --launcher ray --address local --runs . --name b", tmp_path) as program:
        status, _, err = program.ended(within_s=160.0)
    assert status == 0, err
    report = json.loads((tmp_path / "b" / "bench.json").read_text())
    rows = report["rows"]
    assert [(row["engine"], row["mode"]) for row in rows] == [
        ("single", "backprop"),
        ("ddp", "backprop"),
        ("torch", "1F1B"),
        ("freewheel", "naive"),
    ]
    assert {row["launcher"] for row in rows} == {"ray"}
    assert all(host.startswith("node ") for host in report["environment"]["hosts"])
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 4, abs=1e-4), "the same batches"


def test_an_exception_in_a_stage_travels_whole(tmp_path: Path) -> None:
    typed = f"train {HERE / 'failing.py'} --name r --runs . --launcher ray --address local"
    with freewheel(typed, tmp_path) as program:
        status, _, err = program.ended()
    assert status == 1
    assert re.search(r"stage 1, layer 5, batch 5: ZeroDivisionError: as planned \(pid \d+ on node [0-9a-f]{8}", err)
    assert "raise ZeroDivisionError" in err


def test_a_killed_driver_takes_its_own_ray_with_it(tmp_path: Path) -> None:
    with freewheel(f"{_ENDLESS} --address local", tmp_path) as program:
        program.wait_for("held-out loss")
        program.process.kill()
        program.ended()


def test_an_interrupted_driver_stops_everything(tmp_path: Path) -> None:
    with freewheel(f"{_ENDLESS} --address local", tmp_path) as program:
        program.wait_for("held-out loss")
        program.process.send_signal(signal.SIGINT)
        status, _, err = program.ended()
    assert status == 130
    assert "Traceback" not in err


def test_variables_of_ray_are_set_explicitly_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local Ray gets a token of its own, so that nobody else on the host can use it."""
    for name in _FORGET:
        monkeypatch.delenv(name, raising=False)
    before, children = _ray_variables(), psutil.Process().children(recursive=True)
    with ray_cluster.connected("local", {"CPU": 1.0}, 1) as cluster:
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert cluster.node_id
    assert _ray_variables() == before
    left = set(psutil.Process().children(recursive=True)) - set(children)
    assert not psutil.wait_procs(left, timeout=10)[1]


# ---------------------------------------------------------------- a cluster of several nodes


class Nodes:
    """A head without CPUs and two nodes with one each, which demand a token."""

    def __init__(self, token: str) -> None:
        self.env = {**_FORGET, "RAY_AUTH_TOKEN": token}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            self.cluster.add_node(num_cpus=1)

    @property
    def ids(self) -> set[str]:
        """Ids of the two."""
        return {node.node_id for node in self.cluster.worker_nodes}

    def started(self) -> list[psutil.Process]:
        """What stages run in: actors, and what these have started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FREEWHEEL_NODES") == os.environ["FREEWHEEL_NODES"]:
                    words = " ".join(process.cmdline())
                    found += [process] if re.search("ray::Stage|forkserver|resource_tracker", words) else []
            except psutil.Error:
                continue
        return [process for process in found if process.ppid() != os.getpid() and process.pid != os.getpid()]

    def assert_nothing_left(self) -> None:
        """Within ten seconds no actor, no worker, no shared memory of a dead process."""
        deadline = time.monotonic() + 10.0
        while (left := self.started()) and time.monotonic() < deadline:
            psutil.wait_procs(left, timeout=0.2)
        assert not left, f"left behind: {[process.cmdline() for process in left]}"

    @contextmanager
    def asked(self) -> Iterator[list[Any]]:
        """The actors of the run that trains now, by stage, for whoever wants to ask or kill them."""
        ray.init(address=self.cluster.address, namespace=ray_cluster.NAMESPACE, log_to_driver=False)
        try:
            yield [ray.get_actor(name) for name in sorted(ray.util.list_named_actors())]
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    token = secrets.token_hex(32)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "FREEWHEEL_NODES": token[:8]}.items():
            patch.setenv(name, value)
        path = os.pathsep.join([str(HERE.parent), str(HERE)])
        patch.setenv("PYTHONPATH", path)  # the nodes' own, as of an installation
        reset_auth_token_state()
        cluster = Nodes(token)
        try:
            yield cluster
            cluster.assert_nothing_left()
        finally:
            cluster.cluster.shutdown()
    reset_auth_token_state()
    left = psutil.wait_procs([p for p in psutil.Process().children(recursive=True) if "ray" in p.name()], timeout=10)[1]
    assert not left


@contextmanager
def endless(nodes: Nodes, tmp_path: Path) -> Iterator[Program]:
    """A run over both nodes that trains by now."""
    with freewheel(
        f"{_ENDLESS} --address {nodes.cluster.address} --ray.strategy STRICT_SPREAD", tmp_path, **nodes.env
    ) as program:
        program.wait_for("held-out loss")
        yield program


def test_two_nodes_train_over_gloo_and_equal_local_workers_bit_for_bit(nodes: Nodes, tmp_path: Path) -> None:
    local = _local_run((3, 3), tmp_path)
    typed = f"{_digits((3, 3))} --launcher ray --address {nodes.cluster.address} --ray.strategy STRICT_SPREAD"
    with freewheel(typed, tmp_path, **nodes.env) as program:
        status, out, err = program.ended()
    assert status == 0, err
    assert_same(load_file(tmp_path / "r" / "model.safetensors"), local.state_tensors())
    assert os.environ["RAY_AUTH_TOKEN"] not in out + err
    plan = json.loads((tmp_path / "r" / "plan.json").read_text())
    assert [channel["kind"] for channel in plan["channels"]] == ["gloo"]
    (places,) = (decision["value"] for decision in plan["decided"] if decision["what"] == "ray")
    assert set(re.findall(r"node ([0-9a-f]{8})", places)) == {name[:8] for name in nodes.ids}
    assert set(re.findall(r"node\s+([0-9a-f]{8})", out)) >= {name[:8] for name in nodes.ids}
    nodes.assert_nothing_left()


def _actor_by_ray(nodes: Nodes, stage: int) -> float:
    with nodes.asked() as actors:
        ray.kill(actors[stage])
        return time.monotonic()


def _actor_by_signal(nodes: Nodes, stage: int) -> float:
    with nodes.asked() as actors:
        pid = ray.get(actors[stage].status.remote(), timeout=10)["pid"]
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def _node(nodes: Nodes, stage: int) -> float:
    with nodes.asked() as actors:
        where = ray.get(actors[stage].status.remote(), timeout=10)["node"]
    (node,) = (node for node in nodes.cluster.worker_nodes if node.node_id == where)
    start = time.monotonic()
    nodes.cluster.remove_node(node, allow_graceful=False)
    return start


@pytest.mark.parametrize("kill", [_actor_by_ray, _actor_by_signal, _node])
def test_who_is_killed_is_named_within_five_seconds(
    kill: Callable[[Nodes, int], float], nodes: Nodes, tmp_path: Path
) -> None:
    """Not the stage that saw its connection break. Counted until the driver wrote its verdict down."""
    with endless(nodes, tmp_path) as program:
        plan = json.loads((tmp_path / "r" / "plan.json").read_text())
        killed = kill(nodes, 1)
        failure = tmp_path / "r" / "failure.txt"
        while not failure.exists() and time.monotonic() < killed + 20:
            psutil.wait_procs([psutil.Process(program.process.pid)], timeout=0.05)
        seconds = failure.stat().st_mtime - (time.time() - time.monotonic()) - killed
        status, _, err = program.ended()
    assert status == 1, err
    (places,) = (decision["value"] for decision in plan["decided"] if decision["what"] == "ray")
    (node,) = re.findall(r"1 on (node [0-9a-f]{8} \([\d.]+\))", places)
    assert re.search(rf"freewheel: stage 1: .*\(pid \d+ on {re.escape(node)}\)", err), err
    assert seconds < 5, f"{seconds} s"
    nodes.assert_nothing_left()
    while len(nodes.cluster.worker_nodes) < 2:
        nodes.cluster.add_node(num_cpus=1)


def test_actors_of_a_killed_driver_end(nodes: Nodes, tmp_path: Path) -> None:
    with endless(nodes, tmp_path) as program:
        assert nodes.started()
        program.process.kill()
        program.ended()
    nodes.assert_nothing_left()


def test_control_methods_answer_while_training_runs_and_stop_ends_the_run(nodes: Nodes, tmp_path: Path) -> None:
    with endless(nodes, tmp_path) as program:
        with nodes.asked() as actors:
            statuses = ray.get([actor.status.remote() for actor in actors], timeout=10)
            assert [status["stage"] for status in statuses] == [0, 1]
            assert {status["node"] for status in statuses} == nodes.ids
            assert all(status["progress"] > 0 for status in statuses)
            ray.get(actors[0].stop.remote(), timeout=10)
        status, _, err = program.ended()
    assert status == 130, err
    nodes.assert_nothing_left()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--stages 3 --sizes 2 3 3 --ray.strategy STRICT_SPREAD --ray.wait-s 1.5",
            r"no room for 3 stages with CPU 1 each \(STRICT_SPREAD\) within 1\.5 s: .*has CPU 1, free CPU 1",
        ),
        ("--ray.resources disk=2 --ray.wait-s 1.5", r"2 stages with CPU 1, disk 2 each \(PACK\) .* free CPU 1, disk 0"),
    ],
)
def test_a_cluster_without_room_is_refused_with_what_is_there(
    options: str, message: str, nodes: Nodes, tmp_path: Path
) -> None:
    with freewheel(f"{_ENDLESS} --address {nodes.cluster.address} {options}", tmp_path, **nodes.env) as program:
        status, _, err = program.ended()
    assert status == 2
    assert re.search(message, err), err
    assert not (tmp_path / "r").exists(), "nothing was begun"


def test_a_cluster_that_demands_a_token_refuses_who_has_none(nodes: Nodes, tmp_path: Path) -> None:
    env = {**nodes.env, "RAY_AUTH_TOKEN": None, "RAY_AUTH_MODE": "disabled"}
    with freewheel(f"{_ENDLESS} --address {nodes.cluster.address}", tmp_path, **env) as program:
        status, _, err = program.ended()
    assert status == 2, err
    assert "Ray does not take this program" in err


# ---------------------------------------------------------------- metrics, and jobs


def test_metrics_say_what_was_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two reports of two batches of 16 rows, half a second apart; stage 1 is found waiting once in two looks."""
    statuses = iter([Span.FORWARD, Span.WAIT, Span.STEP, Span.FORWARD])
    monkeypatch.setattr(Fleet, "read", lambda self, stage: Status(next(statuses), 0, 0, 0))
    said = [records.Loss(0, [2.0, 4.0], 10**9), records.Loss(2, [1.0, 2.0], 10**9 + 5 * 10**8)]
    monkeypatch.setattr(Fleet, "run", lambda self, run_dir: iter(said))
    shown: list[tuple[float, float | None, list[float]]] = []
    resolved = resolve_source(problems.recipe, Plan(stages=2, sizes=(4, 4), steps=4))
    working = ray_launcher.showing(Fleet(2, lambda: False), lambda run: lambda *values: shown.append(values))
    with working(problems.recipe, resolved, tmp_path) as (reported, _):
        assert list(reported) == said
    assert shown == [(3.0, None, [1.0, 0.0]), (1.5, 64.0, [1.0, 0.5])]


@pytest.mark.skipif(importlib.util.find_spec("aiohttp_cors") is None, reason="ray job submit needs ray[default]")
def test_a_submitted_job_trains_a_recipe_of_its_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver runs in the cluster, in a copy of the folder; its lines come back through the job server."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("problems.py", "ray_threads.py"):
        shutil.copy(HERE / name, folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    reset_auth_token_state()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": True, "dashboard_port": 0}
    )
    try:
        command = f"{sys.executable} -m launch train ray_threads.py --launcher ray --name j --runs {tmp_path}".split()
        submit = ["job", "submit", "--address", f"http://{cluster.head_node.webui_url}", "--working-dir", str(folder)]
        ray_command = [sys.executable, "-m", "ray.scripts.scripts", *submit, "--", *command]
        ended = subprocess.run(ray_command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "ray_threads: naive, 2 stages" in ended.stdout
    finally:
        cluster.shutdown()
        monkeypatch.undo()
        reset_auth_token_state()
    assert json.loads((tmp_path / "j" / "result.json").read_text())["launcher"] == "ray"


# ---------------------------------------------------------------- refused before anything starts


def test_an_address_at_which_nobody_answers_is_refused(tmp_path: Path) -> None:
    """What can be known without Ray stands in test_cli."""
    with freewheel("train digits --runs . --launcher ray --address 127.0.0.1:1", tmp_path, **_FORGET) as program:
        status, _, err = program.ended()
    assert status == 2
    assert re.search(r"address 127.0.0.1:1: no Ray cluster answers at \S+:1 \(", err), err
    assert not list(tmp_path.iterdir())
