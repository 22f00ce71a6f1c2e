"""Where workers compute: a choice made from words and counts, before anything starts."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import msgspec
import problems
import pytest
import torch

import launch.on_ray
from launch import train
from launch.bench.rows import ROWS
from launch.bench.where_rows_run import LOCAL
from launch.cli import run_command
from launch.on_ray import launcher as ray_launcher
from launch.on_ray.gpus import assigned_device, check_own_room, gpus_wanted, without_places
from launch.options.options import parse
from launch.options.ray_options import TrainOptions
from launch.ranks.agreement import prepare_task, profile
from launch.setup.local_gpus import chosen_here, gpus_here
from launch.setup.resolve_source import resolve_source
from pipeline import Plan, PlanError, run_reference
from pipeline.plan.channel_choice import CHANNELS, ChannelChoice, choose_channels, kind_between
from pipeline.plan.check import check_plan
from pipeline.plan.device_choice import choose_devices, on_gpu
from workers.channels.gpu.cuda_ipc import HEADER_SLOT_BYTES
from workers.channels.names import Names
from workers.channels.shm.ring import ring_bytes
from workers.supervision.control_records import Hello, Task
from workers.supervision.control_socket import ControlSocket
from workers.supervision.rank_connection import RankConnection
from workers.supervision.remote_workers import RemoteWorkers
from workers.wiring.edges import KINDS, channels_of, ring_slot_bytes
from workers.wiring.run_memory import needed_bytes

NO_GPU = not torch.cuda.device_count()


@pytest.mark.parametrize(
    ("wanted", "hosts", "gpus", "devices", "why"),
    [
        ("cpu", "a a", {"a": 8}, "cpu cpu", "as asked for"),
        ("auto", "a a", {}, "cpu cpu", "torch finds no GPU on a"),
        ("auto", "a a b", {"a": 2}, "cpu cpu cpu", "torch finds no GPU on b"),
        ("auto", "a a", {"a": 1}, "cuda:0 cuda:0", "1 GPU found; workers share them"),
        ("auto", "a a", {"a": 2}, "cuda:0 cuda:1", "2 GPUs found"),
        ("auto", "a a", {"a": 8}, "cuda:0 cuda:1", "8 GPUs found"),
        (
            "cuda",
            "a a a a a a",
            {"a": 4},
            "cuda:0 cuda:0 cuda:1 cuda:2 cuda:2 cuda:3",
            "4 GPUs found; workers share them",
        ),
        ("cuda", "a b a b", {"a": 2, "b": 2}, "cuda:0 cuda:0 cuda:1 cuda:1", "4 GPUs found"),
        ("cuda:1", "a a", {"a": 2}, "cuda:1 cuda:1", "as asked for; workers share them"),
        ("cuda:1,cuda:0", "a a", {"a": 2}, "cuda:1 cuda:0", "as asked for"),
        ("cpu,cuda:0", "a a a", {"a": 1}, "cpu cpu cuda:0", "as asked for"),
    ],
)
def test_devices_are_shared_out(wanted: str, hosts: str, gpus: Mapping[str, int], devices: str, why: str) -> None:
    chosen = choose_devices(wanted, hosts.split(), gpus)
    assert (" ".join(chosen.devices), chosen.why) == (devices, why)


@pytest.mark.parametrize(
    ("wanted", "gpus", "built", "problems"),
    [
        (
            "cuda",
            {},
            False,
            "device cuda: this torch is built without CUDA: install a build of torch with CUDA, or choose device cpu.",
        ),
        (
            "cuda",
            {},
            True,
            "device cuda: torch finds no GPU on a: look what nvidia-smi says there, or choose device cpu.",
        ),
        ("cuda:2", {"a": 2}, True, "device cuda:2: a has cuda:0 to cuda:1: choose among these, or device cpu."),
        ("cuda:0", {}, True, "device cuda:0: torch finds no GPU on a: choose among these, or device cpu."),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    wanted: str, gpus: Mapping[str, int], built: bool, problems: str
) -> None:
    with pytest.raises(PlanError) as caught:
        choose_devices(wanted, ["a", "a"], gpus, built)
    assert caught.value.problems == (problems,)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:0,", "", "cuda:0 cuda:1", "cuda,cpu"])
def test_a_device_that_is_no_name_of_one_is_refused(device: str) -> None:
    with pytest.raises(PlanError, match=re.escape(f"device is {device!r}: give auto, cpu, cuda, or devices")):
        check_plan(Plan(device=device))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(emulate="stage_ms=1", device="cuda"), "device has no effect with emulate"),
        (Plan(emulate="stage_ms=1", autocast="bf16"), "autocast has no effect with emulate"),
        (Plan(emulate="stage_ms=1", compile=True), "compile has no effect with emulate"),
        (Plan(mode="async-1f1b", compile=True), "compile and stashed weights do not go together"),
        (Plan(targets="true", compile=True), "compile and stashed weights do not go together"),
        (Plan(unlock="auto", compile=True), "compile and stashed weights do not go together"),
        (Plan(autocast="fp16"), "unknown autocast dtype 'fp16'; did you mean 'bf16'?"),  # type: ignore[arg-type]
        (Plan(mode="naive", deterministic=True), "deterministic has no effect with mode naive"),
        (Plan(mode="naive", deterministic=True, device="cpu"), "deterministic has no effect with mode naive"),
    ],
)
def test_what_cannot_be_computed_so_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        check_plan(plan)


def test_locked_training_on_gpus_may_ask_for_deterministic_algorithms() -> None:
    assert check_plan(Plan(mode="naive", deterministic=True, device="cuda"))


def test_every_channel_that_a_plan_can_name_can_be_opened() -> None:
    assert set(KINDS) == set(CHANNELS)


def test_the_channel_of_a_cut_follows_from_hosts_and_devices() -> None:
    hosts, devices = ["a", "a", "a", "a", "b"], ["cpu", "cuda:0", "cuda:0", "cuda:1", "cuda:0"]
    assert [(choice.kind, choice.why) for choice in choose_channels("auto", hosts, devices=devices)] == [
        ("shm", "both workers on one host"),
        ("cuda", "both workers on cuda:0"),
        ("cuda", "cuda:0 and cuda:1 are on one host"),
        ("gloo", "a and b are two hosts, and this torch is built without NCCL"),
    ]
    assert [choice.kind for choice in choose_channels("auto", hosts, devices=devices, nccl=True)] == [
        "shm",
        "cuda",
        "cuda",
        "nccl",
    ]
    assert choose_channels("auto", ["a", "b"], devices=["cuda:0", "cuda:0"], nccl=True)[0].why == (
        "a and b are two hosts, both workers on GPUs"
    )
    assert choose_channels("auto", ["a", "b"], devices=["cpu", "cuda:0"], nccl=True)[0].kind == "gloo"
    assert choose_channels("nccl", ["a", "a"], devices=["cuda:0", "cuda:1"], nccl=True)[0].kind == "nccl"
    assert kind_between("auto", ("a", "cuda:0"), ("a", "cuda:3")) == "cuda"
    assert kind_between("gloo", ("a", "cuda:0"), ("a", "cuda:3")) == "gloo"
    assert kind_between("auto", ("a", "cuda:0"), ("b", "cuda:0")) == "gloo"
    assert kind_between("auto", ("a", "cuda:0"), ("b", "cuda:0"), nccl=True) == "nccl"
    assert {choice.kind for choice in choose_channels("shm", hosts[:4], devices=devices[:4])} == {"shm"}


@pytest.mark.parametrize(
    ("hosts", "devices", "message"),
    [
        ("a b", "cuda:0 cuda:0", "channels cuda: the workers on both sides of cut 0 are on different hosts, a and b"),
        ("a a", "cpu cuda:0", "channels cuda: the workers on both sides of cut 0 compute on cpu and cuda:0"),
        ("a a", "cpu cpu", "channels cuda: the workers on both sides of cut 0 compute on cpu and cpu"),
    ],
)
def test_peer_memory_that_cannot_be_reached_is_refused(hosts: str, devices: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        choose_channels("cuda", hosts.split(), devices=devices.split())


@pytest.mark.parametrize(
    ("hosts", "devices", "replicas", "nccl", "message"),
    [
        ("a b", "cuda:0 cuda:0", 1, False, "channels nccl: this torch is built without NCCL: install a build of torch"),
        ("a b", "cpu cuda:0", 1, True, "channels nccl: the workers on both sides of cut 0 compute on cpu and cuda:0"),
        (
            "a a a",
            "cuda:0 cuda:1 cuda:1",
            1,
            True,
            "channels nccl: the workers on both sides of cut 1 are both on cuda:1 of a, and NCCL refuses two on one "
            "GPU: choose channels auto, or a device for each",
        ),
        (
            "a a a a",
            "cuda:0 cuda:1 cuda:0 cuda:1",
            2,
            True,
            "channels nccl: replicas of a stage are both on cuda:0 of a",
        ),
    ],
)
def test_nccl_is_refused_where_it_does_not_work(
    hosts: str, devices: str, replicas: int, nccl: bool, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        choose_channels("nccl", hosts.split(), replicas, devices.split(), nccl)


def test_a_plan_that_asks_for_nccl_is_refused_before_anything_starts() -> None:
    with pytest.raises(PlanError, match="channels nccl: "):
        resolve_source(problems.recipe, Plan(stages=2, sizes=(4, 4), channels="nccl", device="cpu"))


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here")
def test_without_a_gpu_everything_is_on_the_cpu_and_the_first_screen_says_so() -> None:
    resolved = resolve_source(problems.recipe, Plan(stages=2, sizes=(4, 4)))
    assert resolved.devices == ("cpu", "cpu")
    reason = next(reason for reason in resolved.reasons if reason[0] == "device")
    assert reason[1] == "cpu"
    assert reason[2].startswith("torch finds no GPU") or reason[2] == "this torch is built without CUDA"
    assert gpus_here() == 0
    assert chosen_here(Plan(emulate="stage_ms=1")).why == "stages sleep instead of computing"
    for plan in (Plan(steps=1, device="cuda"), Plan(steps=1, device="cuda:0")):
        with pytest.raises(PlanError, match=f"device {plan.device}: "):
            run_reference(problems.recipe(), plan)
        with pytest.raises(PlanError, match=f"device {plan.device}: "):
            train(model=problems.two_linear, batches=problems.batch, loss=problems.recipe().loss, plan=plan)


def test_edges_know_the_devices_of_their_ends_and_peer_memory_takes_little_of_the_hosts() -> None:
    """Resolved by hand: as it would be with two GPUs."""
    there = resolve_source(problems.recipe, Plan(stages=3, sizes=(3, 3, 2), replicas=2, device="cpu"))
    devices = ("cpu", "cuda:0", "cuda:0", "cpu", "cuda:1", "cuda:1")
    choices = choose_channels("auto", there.hosts, 2, devices)
    there = replace(there, devices=devices, channels=choices)
    edges = {edge.label: edge for edge in channels_of(there, Names("x"))}
    up = edges["gradients 2->1 of replica 1"]
    assert (up.kind, up.source_device, up.target_device) == ("cuda", "cuda:1", "cuda:1")
    down = edges["activations 0->1 of replica 0"]
    assert (down.kind, down.source_device, down.target_device) == ("shm", "cpu", "cuda:0")
    share = edges["averages 0->1 of stage 2"]
    assert (share.kind, share.source_device, share.target_device) == ("cuda", "cuda:0", "cuda:1")
    assert ring_slot_bytes(up) == HEADER_SLOT_BYTES
    assert ring_slot_bytes(down) == down.slot_bytes
    expected = [ring_bytes(e.slots, size) for e in edges.values() if (size := ring_slot_bytes(e)) is not None]
    assert needed_bytes(there) == sum(expected)


def test_neither_the_driver_nor_the_fork_server_asks_for_cuda() -> None:
    """A process that has asked the CUDA runtime for anything must not fork."""
    program = """
import torch
asked = []
for name in ("is_available", "_lazy_init", "current_device", "init", "set_device"):
    setattr(torch.cuda, name, lambda *a, name=name, **k: asked.append(name) or False)
import torch._dynamo, workers.worker.main, workers.channels.gpu.cuda_engine, launch.training, launch.bench.channel
from pipeline import Plan
import problems
from launch.setup.resolve_source import resolve_source
resolve_source(problems.two_linear_recipe, Plan(stages=2, device="cpu"))
assert not asked, asked
"""
    folder = Path(__file__).parent
    paths = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder.parent)!r}]\n"
    done = subprocess.run([sys.executable, "-c", paths + program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here")
@pytest.mark.parametrize("command", ["train digits --device cuda", "bench channel --device cuda"])
def test_the_command_line_refuses_a_gpu_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(command.split())
    assert ended.value.code == 2
    assert re.match(r"freewheel: device cuda: .* or choose device cpu\.\n$", capsys.readouterr().err)


# ---------------------------------------------------------------- Ray says which GPU


@pytest.mark.parametrize(
    ("plan", "given", "gpus"),
    [
        (Plan(device="cuda"), None, 1.0),
        (Plan(device="cuda"), 0.25, 0.25),
        (Plan(), None, 0.0),
        (Plan(), 0.0, 0.0),
        (Plan(), 0.5, 0.5),
        (Plan(device="cpu"), None, 0.0),
        (Plan(device="cpu,cpu"), 0.0, 0.0),
        (Plan(emulate="stage_ms=1"), None, 0.0),
    ],
)
def test_stages_of_ray_are_on_gpus_where_that_is_asked_for(plan: Plan, given: float | None, gpus: float) -> None:
    assert gpus_wanted(plan, given) == gpus
    choice = without_places(plan, gpus)
    assert (choice.here, all(map(on_gpu, choice.devices))) == (not gpus, bool(gpus))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "train --device cuda:0",
            "device cuda:0: with launcher ray it is Ray that says which GPU each stage gets: give",
        ),
        ("train --device cpu,cuda:1", "device cpu,cuda:1: with launcher ray it is Ray that says which GPU each stage"),
        ("train --device cuda --ray.gpus 0", "ray.gpus is 0 with device cuda: give more than 0, or choose device cpu."),
        ("train --device cpu --ray.gpus 1", "ray.gpus has no effect with device cpu: leave it out, or choose device"),
        (
            "train --emulate stage_ms=1 --ray.gpus 1",
            "ray.gpus has no effect with emulate, whose stages compute nothing",
        ),
        (
            "train --ray.gpus 2",
            "ray.gpus is 2: a stage computes on one GPU: give 1, or a part of one of at least 0.0001",
        ),
        ("train --ray.gpus nan", "ray.gpus is nan: a stage computes on one GPU: give 1, or a part of one of at least"),
        ("train --ray.gpus 0.00001", "ray.gpus is 1e-05: a stage computes on one GPU: give 1, or a part of one of at "),
        ("bench --ray.gpus 1", "bench with launcher ray is there on the CPU only: its row backprop trains in this "),
        ("bench --device cuda", "bench with launcher ray is there on the CPU only: its row backprop trains in this "),
    ],
)
def test_what_is_asked_of_ray_amiss_is_refused_before_ray_is_asked(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # whoever asks for it meets an error
    monkeypatch.delitem(sys.modules, "launch.on_ray.cluster", raising=False)
    monkeypatch.delattr(launch.on_ray, "cluster", raising=False)
    name, *options = command.split()
    with pytest.raises(SystemExit) as ended:
        run_command([name, "digits", "--launcher", "ray", *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"freewheel: {message}")


@pytest.mark.parametrize(
    ("ids", "visible", "count", "built", "device", "problem"),
    [
        ("0", None, 1, True, "cuda:0", ""),
        ("5", None, 8, True, "cuda:5", ""),
        ("5", "2,5", 2, True, "cuda:1", ""),
        ("GPU-b", "GPU-a, GPU-b", 2, True, "cuda:1", ""),
        ("1", None, 0, False, "", "GPU 1 to stage 3, and torch there is built without CUDA: install a build of torch"),
        ("1", None, 0, True, "", "GPU 1 to stage 3, and torch finds no GPU there: look what nvidia-smi says there"),
        ("2", None, 2, True, "", "GPU 2 to stage 3, and torch sees 2 there (0, 1): look what nvidia-smi says there, "),
        ("9", None, 9, True, "", "GPU 9 to stage 3, and torch sees 9 there (0, 1, 2, 3, 4, 5, 6, 7, ...): look what"),
        ("7", "5,7", 1, True, "", "GPU 7 to stage 3, and torch sees 1 there (5): look what nvidia-smi says there, an"),
        ("0", "5,7", 2, True, "", "GPU 0 to stage 3, and torch sees 2 there (5, 7): look what nvidia-smi says there,"),
        ("", None, 2, True, "", "no GPU to stage 3, which computes on one: look at CUDA_VISIBLE_DEVICES in the job's "),
        ("0 1", None, 2, True, "", "2 GPUs (0, 1) to stage 3, which computes on one: look at CUDA_VISIBLE_DEVICES in "),
    ],
)
def test_the_gpu_that_ray_assigned_is_found_among_those_that_torch_sees(
    ids: str, visible: str | None, count: int, built: bool, device: str, problem: str
) -> None:
    """Torch numbers what CUDA_VISIBLE_DEVICES lists; Ray names its entries."""
    found, why = assigned_device("stage 3", ids.split(), visible, count, built)
    assert found == device
    assert why.startswith(f"Ray assigned {problem}" if problem else "")
    assert bool(why) == bool(problem)


@pytest.mark.parametrize(("gpus", "stages", "count"), [(1.0, 2, 2), (0.5, 4, 2), (0.3333, 3, 1), (0.4, 4, 2)])
def test_a_ray_of_ones_own_has_room_for_as_many_stages_as_fit_on_its_gpus(gpus: float, stages: int, count: int) -> None:
    check_own_room(gpus, stages, count)
    with pytest.raises(
        PlanError, match=rf"{stages + 1} stages with GPU {gpus:g} each do not fit, as torch finds \d GPU"
    ):
        check_own_room(gpus, stages + 1, count)
    with pytest.raises(PlanError, match="do not fit, as torch finds none here: give the stages less"):
        check_own_room(gpus, stages, 0)


@pytest.mark.parametrize("replicas", [1, 2])
def test_driver_and_agents_agree_on_the_gpus_that_ray_assigned(replicas: int) -> None:
    """As between processes. Only workers would need a GPU, and none is started."""
    arguments = f"--mode naive --stages 2 --replicas {replicas} --steps 4 --hidden 16 --device cuda".split()
    parsed = parse("digits", [*arguments, "--launcher", "ray"], TrainOptions, "freewheel train", writes=False)
    hosts, devices = ["node a"] * 2 * replicas, ["cuda:3", "cuda:5", "cuda:3", "cuda:0"][: 2 * replicas]
    fleet = RemoteWorkers(len(hosts), lambda: False)
    fleet.members = [
        RankConnection(unused, Hello(rank, 1, host, host, "fw", device=device, nccl=rank > 0))
        for rank, (unused, host, device) in enumerate(zip([Mock(ControlSocket)] * 4, hosts, devices, strict=False))
    ]
    before = resolve_source(parsed.source, parsed.plan, devices=without_places(parsed.plan, 1.0))
    placed = ray_launcher.placed_on_nodes(before, fleet, TrainOptions(), "x-stage-K")
    said = {what: (value, why) for what, value, why in placed.reasons}
    assert said["device"] == (", ".join(devices), "Ray assigned them")
    assert said["split"][1] == "measured time per layer, on the CPU of this host: the GPUs are those of the nodes"
    assert said["ray"][0].startswith("0 on node a, 1 on node a")
    assert {(choice.kind, choice.why) for choice in placed.channels[:1]} == {
        ("cuda", "cuda:3 and cuda:5 are on one host")
    }
    task = Task(list(placed.sizes), hosts, "fw", False, None, profile(placed), list(placed.devices))
    theirs = [prepare_task(rank, parsed, task) for rank in range(len(hosts))]
    assert [assignment.device for assignment in theirs] == devices
    assert {assignment.resolved.channels for assignment in theirs} == {placed.channels}
    other = replace(placed, channels=tuple(ChannelChoice("gloo", "") for _ in placed.channels))
    told = msgspec.structs.replace(task, profile=profile(other))
    with pytest.raises(PlanError, match="its list of channels is cuda"):
        prepare_task(0, parsed, told)


def test_who_measures_layers_for_gpus_elsewhere_measures_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_gpu_here(*_: object) -> list[float]:
        raise AssertionError("no GPU of this host is to be touched")

    monkeypatch.setattr("launch.setup.resolve_source.layer_seconds_on", on_gpu_here)
    plan = Plan(stages=2, device="cuda")
    assert resolve_source(problems.recipe, plan, devices=without_places(plan, 1.0)).layer_seconds is not None
    with pytest.raises(PlanError, match="no GPU of this host"):
        resolve_source(problems.recipe, plan, devices=replace(without_places(plan, 1.0), here=True))


@pytest.mark.parametrize(
    ("changes", "named"), [({"autocast": "bf16"}, "autocast bf16"), ({"compile": True}, "compile")]
)
def test_rivals_that_would_compute_otherwise_are_refused(
    changes: dict[str, object], named: str, tmp_path: Path
) -> None:
    plan = replace(Plan(stages=2, sizes=(4, 4), steps=4), **changes)  # type: ignore[arg-type]
    resolved = resolve_source(problems.recipe, plan)
    for row in ("ddp", "torch-gpipe"):
        with pytest.raises(PlanError, match=f"is compared on the CPU in float32 only: leave {named} out, or that row"):
            ROWS[row](problems.recipe, resolved, tmp_path, LOCAL)
