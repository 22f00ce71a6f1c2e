"""``--launcher ray``: real Ray, on this host and on clusters of several nodes; failures that name stage and node.

The driver is a program of its own, like a user's. The cluster of several nodes demands a token, and serves all tests
but the one that kills its head. What is refused before a worker starts is refused in this process.
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
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import problems
import psutil
import pytest
import torch
from oracle import assert_same
from safetensors.torch import load_file
from torchrun_program import HERE, Program, left_in

from launch.on_ray import launcher as ray_launcher
from launch.recipes.digits import digits
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import Plan, PlanError
from pipeline.metrics.spans import Span
from workers.supervision.remote_workers import RemoteWorkers
from workers.telemetry import records
from workers.telemetry.status_table import Status

ray = pytest.importorskip("ray", reason="the package ray is not installed: pip install 'freewheel[ray]'")

from ray._private.authentication_test_utils import reset_auth_token_state  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.exceptions import RayError  # noqa: E402

from launch.on_ray import cluster as ray_cluster  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]
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


def test_locked_training_equals_local_workers_bit_for_bit(tmp_path: Path) -> None:
    """Three stages find room on two cores too. Nothing of Ray is left when the command has ended."""
    local = _local_run((2, 2, 2), tmp_path)
    with freewheel(f"{_digits((2, 2, 2))} --launcher ray --address local --json r.json", tmp_path) as program:
        status, out, err = program.ended()
    assert status == 0, err
    assert_same(load_file(tmp_path / "r" / "model.safetensors"), local.state_tensors())
    assert_same(load_file(tmp_path / "r" / "optimizer.safetensors"), local.optimizer_tensors())
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["launcher"], result["accuracy"]) == ("ray", local.accuracy)
    assert "shared memory, 4 slots  (all workers on this host" in out
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert {line["event"] for line in lines} == {"train", "evaluation"}
    assert len(list((tmp_path / "r" / "spans").iterdir())) == 3


def test_a_killed_driver_takes_its_own_ray_with_it(tmp_path: Path) -> None:
    with freewheel(f"{_ENDLESS} --address local", tmp_path) as program:
        program.wait_for("held-out loss")
        program.process.kill()
        program.ended()


def test_variables_of_ray_are_set_explicitly_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local Ray gets a token of its own, so that nobody else on the host can use it."""
    for name in _FORGET:
        monkeypatch.delenv(name, raising=False)
    before, children = _ray_variables(), psutil.Process().children(recursive=True)
    with ray_cluster.connected("local", {"CPU": 1.0}, 1) as cluster:
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert _ray_variables()["RAY_worker_niceness"] == "0", "as of local workers"
        assert cluster.node_id
    assert _ray_variables() == before
    left = set(psutil.Process().children(recursive=True)) - set(children)
    assert not psutil.wait_procs(left, timeout=60)[1]


def test_an_address_at_which_nobody_answers_is_refused() -> None:
    """What can be known without Ray stands in test_cli."""
    refused = pytest.raises(PlanError, match=r"address 127\.0\.0\.1:1: no Ray cluster answers at \S+:1 \(")
    with refused, ray_cluster.connected("127.0.0.1:1", {"CPU": 1.0}, 1):
        pass


def test_a_ray_of_ones_own_with_too_few_gpus_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "gpus_here", lambda: 1)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    refused = pytest.raises(
        PlanError, match="address local: 2 stages with GPU 1 each do not fit, as torch finds 1 GPU "
    )
    with refused, ray_cluster.connected("local", {"CPU": 1.0, "GPU": 1.0}, 2):
        pass


# ---------------------------------------------------------------- a cluster of several nodes


class Nodes:
    """A cluster whose nodes demand a token: a head with a number of CPUs, and others with three each.

    These also say that they have two GPUs, which Ray believes.
    """

    def __init__(self, head_cpus: int, others: int) -> None:
        self.env = {**_FORGET, "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
        args = {"num_cpus": head_cpus, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=args)
        for _ in range(others):
            self.add()

    def add(self) -> None:
        """Another node."""
        self.cluster.add_node(num_cpus=3, num_gpus=2)

    @property
    def ids(self) -> set[str]:
        """Ids of all but the head."""
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
        """No actor, no worker, and nothing in the nodes' $TMPDIR but Ray's own."""
        deadline = time.monotonic() + 60.0
        while (left := self.started()) and time.monotonic() < deadline:
            psutil.wait_procs(left, timeout=0.2)
        assert not left, f"left behind: {[process.cmdline() for process in left]}"
        assert not left_in(Path(os.environ["TMPDIR"]))

    @contextmanager
    def asked(self, run_dir: Path) -> Iterator[list[Any]]:
        """The actors of a run that trains now, by stage, for whoever wants to ask or kill them."""
        why = _decided(run_dir)["why"]
        (names,) = re.findall(r"([0-9a-f]{8}-stage-)K", why)
        ray.init(address=self.cluster.address, namespace=ray_cluster.NAMESPACE, log_to_driver=False)
        try:
            yield [ray.get_actor(f"{names}{stage}") for stage in range(2)]
        finally:
            ray.shutdown()


def _decided(run_dir: Path) -> dict[str, str]:
    """What was decided about Ray."""
    plan = json.loads((run_dir / "plan.json").read_text())
    (decision,) = (dict(decision) for decision in plan["decided"] if decision["what"] == "ray")
    return decision


@pytest.fixture(scope="module")
def token() -> Iterator[None]:
    """For all clusters of this module: a token, a tag for whatever they start, and a $TMPDIR with a short name."""
    token = secrets.token_hex(32)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="fw") as temp:
        path = os.pathsep.join([str(HERE.parent), str(HERE)])  # the nodes' own, as of an installation
        given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "FREEWHEEL_NODES": token[:8]}
        # A node would start an idle Python for each of its CPUs as soon as a driver comes, and give actors what others
        # leave of a busy machine (niceness 15).
        given |= {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
        given |= {"RAY_worker_niceness": "0"}
        for name, value in {**given, "PYTHONPATH": path, "TMPDIR": temp}.items():
            patch.setenv(name, value)
        reset_auth_token_state()
        yield
    reset_auth_token_state()


@contextmanager
def _nodes(head_cpus: int, others: int) -> Iterator[Nodes]:
    before = _of_ray()
    nodes = Nodes(head_cpus, others)
    started = _of_ray() - before
    try:
        yield nodes
    finally:
        nodes.cluster.shutdown()
        for process in started:  # Ray's own, which wait for a killed head for a minute
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert not psutil.wait_procs(started, timeout=60)[1]


def _of_ray() -> set[psutil.Process]:
    """What Ray has started on behalf of this process."""
    return {process for process in psutil.Process().children(recursive=True) if "ray" in process.name()}


@pytest.fixture(scope="module")
def nodes(token: None) -> Iterator[Nodes]:
    """The head has no room."""
    with _nodes(0, 2) as nodes:
        yield nodes
        nodes.assert_nothing_left()


@contextmanager
def endless(nodes: Nodes, tmp_path: Path) -> Iterator[Program]:
    """A run over two nodes that trains by now."""
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
    places = _decided(tmp_path / "r")["value"]
    assert set(re.findall(r"node ([0-9a-f]{8})", places)) == {name[:8] for name in nodes.ids}
    assert set(re.findall(r"node\s+([0-9a-f]{8})", out)) >= {name[:8] for name in nodes.ids}
    nodes.assert_nothing_left()


def test_unlocked_training_ends_at_its_goal_with_the_threads_of_the_plan(nodes: Nodes, tmp_path: Path) -> None:
    """Ray would set OMP_NUM_THREADS to the actor's CPUs, which are three here. What workers print is to be seen."""
    goal = "--mode unlocked --until loss=1.3 --evaluate-every 50 --steps 20000"
    typed = f"train {HERE / 'ray_threads.py'} {goal} --name r --runs . --launcher ray --address {nodes.cluster.address}"
    with freewheel(f"{typed} --ray.cpus 3", tmp_path, **nodes.env) as program:
        status, out, err = program.ended()
    assert status == 0, err
    assert set(re.findall(r"StageActor pid=\d+\)\S* threads (\w+ \w+ \w+)", out)) == {"2 2 2"}  # the driver has its own
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["until_samples"] is not None
    assert result["steps"] < 20_000


def test_a_benchmark_runs_its_rows_over_the_actors(nodes: Nodes, tmp_path: Path) -> None:
    """A mode of ours, and a rival whose ranks are children of the same actors; 14 rows make its search short."""
    typed = "bench digits --hidden 32 --batch 14 --stages 2 --rows naive ddp torch-1f1b --steps 6 --rounds 1"
    where = f"--launcher ray --address {nodes.cluster.address} --runs . --name b"
    with freewheel(f"{typed} {where}", tmp_path, **nodes.env) as program:
        status, _, err = program.ended(within_s=300.0)
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


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU here")
def test_a_node_where_torch_sees_no_such_gpu_as_ray_assigned_is_named(nodes: Nodes, tmp_path: Path) -> None:
    """Ray hands out what the nodes said they have; the numbers come back by way of the actors."""
    typed = f"{_digits((3, 3))} --device cuda --launcher ray --address {nodes.cluster.address}"
    with freewheel(typed, tmp_path, **nodes.env) as program:
        status, _, err = program.ended()
    assert status == 2, err
    lines = [" ".join(line.split()) for line in err.splitlines() if "Ray assigned" in line]
    found = [
        re.search(r"rank (\d) on node ([0-9a-f]{8}) \(.*\): Ray assigned GPU ([01]) to stage \1, and torch", line)
        for line in lines
    ]
    assert len({each.groups()[1:] for each in found if each}) == len({each[1] for each in found if each}) == 2, err
    assert all(re.search(r"built without CUDA: install|finds no GPU there: look", line) for line in lines)
    assert not (tmp_path / "r").exists(), "nothing was begun"
    nodes.assert_nothing_left()


def test_an_exception_in_a_stage_travels_whole(nodes: Nodes, tmp_path: Path) -> None:
    typed = f"train {HERE / 'failing.py'} --name r --runs . --launcher ray --address {nodes.cluster.address}"
    with freewheel(typed, tmp_path, **nodes.env) as program:
        status, _, err = program.ended()
    assert status == 1
    assert re.search(r"stage 1, layer 5, batch 5: ZeroDivisionError: as planned \(pid \d+ on node [0-9a-f]{8}", err)
    assert "raise ZeroDivisionError" in err


def _kill_actor(nodes: Nodes, run_dir: Path) -> None:
    with nodes.asked(run_dir) as actors:
        pid = ray.get(actors[1].status.remote(), timeout=60)["pid"]
    os.kill(pid, signal.SIGKILL)


def _kill_node(nodes: Nodes, run_dir: Path) -> None:
    with nodes.asked(run_dir) as actors:
        where = ray.get(actors[1].status.remote(), timeout=60)["node"]
    (node,) = (node for node in nodes.cluster.worker_nodes if node.node_id == where)
    nodes.cluster.remove_node(node, allow_graceful=False)


@pytest.mark.parametrize("kill", [_kill_actor, _kill_node])
def test_who_is_killed_is_named(kill: Callable[[Nodes, Path], None], nodes: Nodes, tmp_path: Path) -> None:
    """Not the stage that saw its connection break; and by what broke or by Ray's word, not because time went by."""
    with endless(nodes, tmp_path) as program:
        (node,) = re.findall(r"1 on (node [0-9a-f]{8} \([\d.]+\))", _decided(tmp_path / "r")["value"])
        kill(nodes, tmp_path / "r")
        status, _, err = program.ended()
    assert status == 1, err
    (line,) = [line for line in err.splitlines() if line.startswith("freewheel: ")]
    assert re.match(rf"freewheel: stage 1: .*\(pid \d+ on {re.escape(node)}\)", line), err
    assert not re.search("timed out|no word from it for|Errno 110", line)
    assert (tmp_path / "r" / "failure.txt").read_text().startswith(line.removeprefix("freewheel: "))
    nodes.assert_nothing_left()
    while len(nodes.cluster.worker_nodes) < 2:
        nodes.add()


def test_actors_of_a_killed_driver_end(nodes: Nodes, tmp_path: Path) -> None:
    """Ray kills actor and fork server at once, so whatever is in $TMPDIR while they train could stay there."""
    with endless(nodes, tmp_path) as program:
        assert nodes.started()
        assert not left_in(Path(os.environ["TMPDIR"]))
        program.process.kill()
        program.ended()
    nodes.assert_nothing_left()


def test_an_interrupted_driver_stops_everything(nodes: Nodes, tmp_path: Path) -> None:
    with endless(nodes, tmp_path) as program:
        program.process.send_signal(signal.SIGINT)
        status, _, err = program.ended()
    assert status == 130, err
    assert "freewheel: interrupted; all workers were stopped" in err
    assert "Traceback" not in err
    nodes.assert_nothing_left()


def test_control_methods_answer_while_training_runs_and_stop_ends_the_run(nodes: Nodes, tmp_path: Path) -> None:
    with endless(nodes, tmp_path) as program:
        with nodes.asked(tmp_path / "r") as actors:
            deadline = time.monotonic() + 60.0
            statuses: list[Any] = []
            while not statuses or (any(each["progress"] == 0 for each in statuses) and time.monotonic() < deadline):
                statuses = ray.get([actor.status.remote() for actor in actors], timeout=60)
            assert [status["stage"] for status in statuses] == [0, 1]
            assert {status["node"] for status in statuses} == nodes.ids
            assert all(status["progress"] > 0 for status in statuses), "an agent looks twice a second"
            with suppress(RayError):  # the run may be over before the answer is here
                ray.get(actors[0].stop.remote(), timeout=60)
        status, _, err = program.ended()
    assert status == 130, err
    nodes.assert_nothing_left()


@pytest.mark.parametrize(
    ("needs", "stages", "strategy", "message"),
    [
        (
            {"CPU": 2.0},
            3,
            "STRICT_SPREAD",
            r"no room for 3 stages with CPU 2 each \(STRICT_SPREAD\) within 1\.5 s: .*has CPU 3, free CPU 3",
        ),
        (
            {"CPU": 1.0, "GPU": 1.0},
            5,
            "PACK",
            r"5 stages with CPU 1, GPU 1 each .*has CPU 3, GPU 2, free CPU 3, GPU 2.*less \(--ray\.cpus, --ray\.gpus\)",
        ),
        ({"CPU": 1.0, "disk": 2.0}, 2, "PACK", r"2 stages with CPU 1, disk 2 each \(PACK\) .* free CPU 3, disk 0"),
    ],
)
def test_a_cluster_without_room_is_refused_with_what_is_there(
    needs: dict[str, float], stages: int, strategy: str, message: str, nodes: Nodes
) -> None:
    with (
        ray_cluster.connected(nodes.cluster.address, needs, stages) as cluster,
        pytest.raises(PlanError, match=message),
        cluster.stages(needs, stages, strategy, 1.5, lambda: False),
    ):
        pass


def test_a_cluster_that_demands_a_token_refuses_who_has_none(nodes: Nodes, tmp_path: Path) -> None:
    env = {**nodes.env, "RAY_AUTH_TOKEN": None, "RAY_AUTH_MODE": "disabled"}
    with freewheel(f"{_ENDLESS} --address {nodes.cluster.address}", tmp_path, **env) as program:
        status, _, err = program.ended()
    assert status == 2, err
    assert "Ray does not take this program" in err
    assert not (tmp_path / "r").exists(), "nothing was begun"


# ---------------------------------------------------------------- the head


def test_a_run_ends_with_one_message_when_only_the_heads_service_dies(nodes: Nodes, tmp_path: Path) -> None:
    """All stages could go on, but Ray would end driver and actors after a minute, without a word.

    The last test with these nodes: nothing can be asked of them any more.
    """
    address = nodes.cluster.address  # Ray forgets it
    with endless(nodes, tmp_path) as program:
        nodes.cluster.head_node.kill_gcs_server(check_alive=False)
        status, _, err = program.ended()
    assert status == 1, err
    (line,) = [line for line in err.splitlines() if line.startswith("freewheel: ")]
    silent = re.escape(f"the Ray cluster's head at {address} does not answer ([Errno 111] ")
    assert re.match(rf"freewheel: {silent}.*, for \d+ s now, and Ray ends .*: look whether the head node is", line), err
    assert (tmp_path / "r" / "failure.txt").read_text().startswith(line.removeprefix("freewheel: "))
    nodes.assert_nothing_left()


def test_a_lost_head_ends_the_run_with_one_message(token: None, tmp_path: Path) -> None:
    """A stage is on the head node. Ray's own calls then hang, and Ray would end the driver after a minute."""
    with _nodes(1, 1) as doomed:
        with endless(doomed, tmp_path) as program:
            doomed.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
            status, _, err = program.ended()
        assert status == 1, err
        (line,) = [line for line in err.splitlines() if line.startswith("freewheel: ")]
        silent = f"the Ray cluster's head at {doomed.cluster.address} does not answer ("
        assert re.match(rf"freewheel: stage \d: rank \d \(.*\) is gone without a word \({re.escape(silent)}", line), err
        assert (tmp_path / "r" / "failure.txt").read_text().startswith(line.removeprefix("freewheel: "))
    doomed.assert_nothing_left()


# ---------------------------------------------------------------- metrics, and jobs


def test_metrics_say_what_was_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two reports of two batches of 16 rows, half a second apart; stage 1 is found waiting once in two looks."""
    statuses = iter([Span.FORWARD, Span.WAIT, Span.STEP, Span.FORWARD])
    monkeypatch.setattr(RemoteWorkers, "read", lambda self, stage: Status(next(statuses), 0, 0, 0))
    said = [records.Loss(0, [2.0, 4.0], 10**9), records.Loss(2, [1.0, 2.0], 10**9 + 5 * 10**8)]
    monkeypatch.setattr(RemoteWorkers, "run", lambda self, run_dir: iter(said))
    shown: list[tuple[float, float | None, list[float]]] = []
    resolved = resolve_source(problems.recipe, Plan(stages=2, sizes=(4, 4), steps=4))
    working = ray_launcher.showing(RemoteWorkers(2, lambda: False), lambda run: lambda *values: shown.append(values))
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
        ended = subprocess.run(ray_command, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "ray_threads: naive, 2 stages" in ended.stdout
    finally:
        cluster.shutdown()
        monkeypatch.undo()
        reset_auth_token_state()
    assert json.loads((tmp_path / "j" / "result.json").read_text())["launcher"] == "ray"
