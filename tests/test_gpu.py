"""Training on a GPU. Everything here needs one: ``pytest -m gpu``; on other machines it is skipped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from safetensors.torch import load_file
from torch import Tensor, nn

from launch import train
from launch.bench.channel import bench_channel
from launch.bench.single_process import run_single
from launch.results.result import Result
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import ChannelPlan, Plan, Recipe, run_reference
from pipeline.data.recipe import build_model
from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message
from pipeline.metrics.spans import Span, Spans
from pipeline.plan.topology import Edge
from pipeline.seeding import seed_layer
from workers.channels.interface import Receiver, Sender
from workers.channels.net.gloo import Rendezvous
from workers.channels.shm.ring import create_ring, new_prefix, unlink_ring
from workers.errors import RunFailed
from workers.telemetry.gpu_span_recorder import CudaMarks, GpuSpanRecorder
from workers.telemetry.status_table import StatusTable
from workers.wiring.edges import ChannelSpec, open_receiver, open_sender, ring_slot_bytes

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product of this process
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # torch warns of what has no deterministic form

GPU = "cuda:0"
STEPS, DEADLINE_S = 12, 20.0
SIZES = {1: (8,), 2: (4, 4), 4: (1, 3, 2, 2)}
WIDE = partial(problems.wide_recipe, layers=8, width=4096, rows=4096)
"""Steps of milliseconds on a GPU: the host is far ahead of it."""


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def locked(stages: int, **changes: object) -> Plan:
    plan = Plan(mode="naive", stages=stages, sizes=SIZES[stages], steps=STEPS, device="cuda", deterministic=True)
    return replace(plan, **changes)  # type: ignore[arg-type]


def _alone(recipe: Recipe, plan: Plan) -> dict[str, Tensor]:
    """A plain loop on the GPU over the unsplit model."""
    model = build_model(recipe, plan.seed).to(GPU)
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.optimizer.lr, fused=True)
    with deterministic():
        for step in range(plan.steps or 0):
            x, labels = (tensor.to(GPU) for tensor in recipe.batch(step))
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=plan.autocast is not None):
                for index, layer in enumerate(model):
                    seed_layer(plan.seed, index, step)
                    x = layer(x)
                loss = recipe.loss(x, labels)
            loss.backward()
            optimizer.step()
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return _alone(problems.recipe(), locked(1))


@pytest.fixture(scope="module")
def autocast_alone() -> dict[str, Tensor]:
    return _alone(problems.recipe(), locked(1, autocast="bf16"))


def trained(source: Callable[[], Recipe], plan: Plan, runs: Path) -> Result:
    return run(source, resolve_source(source, plan), runs, "run", Console(quiet=True), ["test"])


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("stages", SIZES)
def test_locked_stages_on_the_gpu_equal_a_plain_loop_bit_for_bit(stages: int, alone: dict[str, Tensor]) -> None:
    with deterministic():
        result = run_reference(problems.recipe(), locked(stages))
    assert {tensor.device.type for tensor in result.state_tensors().values()} == {"cuda"}
    assert_same({name: tensor.cpu() for name, tensor in result.state_tensors().items()}, alone)


@pytest.mark.processes
@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("channels", ["auto", "shm", "gloo"])
def test_locked_workers_on_one_gpu_equal_a_plain_loop_bit_for_bit(
    stages: int, channels: str, alone: dict[str, Tensor], tmp_path: Path
) -> None:
    result = trained(problems.recipe, locked(stages, channels=channels), tmp_path)
    kinds = {choice.kind for choice in result.resolved.channels}
    assert kinds == {"cuda" if channels == "auto" else channels}
    assert set(result.resolved.devices) == {GPU}
    assert_same(load_file(result.run_dir / "model.safetensors"), alone)
    problems.dropout_and_batch_norm().load_state_dict(load_file(result.export(tmp_path / "model.safetensors")))


@pytest.mark.processes
@pytest.mark.parametrize("stages", [2, 4])
def test_autocast_on_the_gpu_equals_a_plain_loop_under_autocast(
    stages: int, autocast_alone: dict[str, Tensor], tmp_path: Path
) -> None:
    result = trained(problems.recipe, locked(stages, autocast="bf16"), tmp_path)
    assert_same(load_file(result.run_dir / "model.safetensors"), autocast_alone)


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["gpipe", "1f1b"])
def test_microbatches_travel_between_gpus_too(mode: str, tmp_path: Path) -> None:
    plan = locked(2, mode=mode, microbatches=4)
    with deterministic():
        truth = run_reference(problems.recipe(), plan).state_tensors()
    result = trained(problems.recipe, plan, tmp_path)
    assert_same(load_file(result.run_dir / "model.safetensors"), {name: t.cpu() for name, t in truth.items()})


@pytest.mark.processes
@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
def test_unlocked_runs_on_one_gpu_repeat_and_equal_the_reference(targets: str, tmp_path: Path) -> None:
    plan = replace(locked(4), mode="unlocked", targets=targets)
    with deterministic():
        truth = run_reference(problems.recipe(), plan).state_tensors()
    result = trained(problems.recipe, plan, tmp_path)
    assert_same(load_file(result.run_dir / "model.safetensors"), {name: t.cpu() for name, t in truth.items()})


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_replicas_on_one_gpu_average_over_peer_memory(mode: str, tmp_path: Path) -> None:
    plan = Plan(mode=mode, stages=2, replicas=2, sizes=(4, 4), steps=40, device="cuda")
    result = trained(problems.recipe, plan, tmp_path)
    assert sum(result.losses[-10:]) < sum(result.losses[:10])


@pytest.mark.processes
def test_a_wire_dtype_is_narrowed_on_the_device(tmp_path: Path) -> None:
    plan = replace(locked(2), channel=ChannelPlan(wire_dtype="bf16"))
    with deterministic():
        truth = run_reference(problems.recipe(), plan).state_tensors()
    result = trained(problems.recipe, plan, tmp_path)
    assert_same(load_file(result.run_dir / "model.safetensors"), {name: t.cpu() for name, t in truth.items()})


@pytest.mark.processes
def test_stages_on_the_cpu_and_on_the_gpu_work_together(tmp_path: Path) -> None:
    plan = Plan(mode="unlocked", stages=2, sizes=(4, 4), steps=60, device="cpu,cuda:0")
    result = trained(problems.recipe, plan, tmp_path)
    assert result.resolved.devices == ("cpu", GPU)
    assert [choice.kind for choice in result.resolved.channels] == ["shm"]
    assert sum(result.losses[-10:]) < sum(result.losses[:10])


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_compiled_stages_learn_on_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="torch.compile needs Triton for a GPU")
    result = trained(problems.recipe, Plan(mode="naive", stages=2, steps=40, device="cuda", compile=True), tmp_path)
    assert sum(result.losses[-10:]) < sum(result.losses[:10])


# ---------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    plan = Plan(mode="unlocked", stages=2, steps=30, device="cuda")
    return trained(WIDE, plan, tmp_path_factory.mktemp("runs"))


def test_layers_are_measured_on_the_gpu_and_the_split_is_even(wide_run: Result) -> None:
    assert wide_run.resolved.layer_seconds is not None
    assert max(wide_run.resolved.layer_seconds) < 0.1, "on the CPU a layer takes longer"
    assert wide_run.resolved.sizes in ((4, 4), (3, 5), (5, 3))


def test_spans_say_what_the_device_did(wide_run: Result) -> None:
    """A forward pass of 4 products of 4,096 x 4,096 x 4,096 takes longer than to queue it, which takes microseconds."""
    for spans, record in zip(wide_run.spans, wide_run.finished.values(), strict=True):
        assert (spans.end_ns >= spans.start_ns).all()
        wall_s = (record.end_ns - record.begin_ns) * 1e-9
        assert spans.seconds() == pytest.approx(wall_s, rel=0.05, abs=0.01)
        flop = 2 * 4096**3 * 3  # of at least three layers
        assert spans.seconds(Span.FORWARD) / 30 > flop / 1e15, "no GPU makes 1,000 TFLOP/s in float32"
    assert wide_run.measured is not None
    assert all(stage.shares["backward"] > stage.shares["forward"] for stage in wide_run.measured.stages)


def test_peak_memory_is_that_of_the_gpu(wide_run: Result) -> None:
    weights = 4 * 4096 * 4096 * 4
    for record in wide_run.finished.values():
        assert 3 * weights / 4 * 3 < record.peak_memory_bytes < 20 << 30, "weights, gradients and Adam's state at least"


@pytest.mark.processes
def test_the_yardstick_runs_on_the_same_gpu() -> None:
    plan = resolve_source(WIDE, Plan(mode="naive", stages=1, steps=20, device="cuda")).plan
    done = run_single(WIDE, plan, threads=1, warmup=2, within_s=100.0, device=GPU)
    assert done.batches == 18
    assert done.seconds > 0
    assert done.peak_memory_bytes[0] > 8 * 4096 * 4096 * 4 * 3


@pytest.mark.processes
def test_a_hop_between_processes_is_measured_over_every_channel() -> None:
    rows = bench_channel(sizes=(4, 1 << 20), rounds=1, devices=(GPU, GPU))
    assert [(row.channel, row.message_bytes) for row in rows] == [
        (channel, size) for channel in ("shared memory", "gloo", "CUDA peer memory") for size in (4, 1 << 20)
    ]
    assert all(row.hop_p50_us.median > 0 and row.gb_per_s.median > 0 for row in rows)


# ---------------------------------------------------------------- channels, with tensors of the GPU


@contextmanager
def ends(kind: str, slot_bytes: int, wire_dtype: torch.dtype | None = None) -> Iterator[tuple[Sender, Receiver]]:
    edge = ChannelSpec(
        Edge(0, 1, "activations", 0), kind, f"{new_prefix()}-a", "a 0->1", 2, slot_bytes, wire_dtype, GPU, GPU
    )
    with ExitStack() as stack:
        size = ring_slot_bytes(edge)
        assert size is not None
        create_ring(edge.name, edge.slots, size)
        stack.callback(unlink_ring, edge.name)
        receiver = stack.enter_context(open_receiver(edge, lambda stage: None, None, DEADLINE_S))
        yield stack.enter_context(open_sender(edge, lambda stage: None, None, DEADLINE_S)), receiver


KINDS = ("shm", "cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_the_gpu_arrive_there_in_order_and_may_be_changed_at_once(kind: str) -> None:
    with ends(kind, 1 << 20) as (sender, receiver):
        tensor = torch.empty(50_000, device=GPU)
        for batch in range(50):
            tensor.fill_(batch)
            payload = tensor, torch.tensor([batch], device=GPU)
            sender.send(Message(Kind.ACTIVATION, Item(batch), 0, payload), DEADLINE_S)
            tensor.fill_(-1)
            arrived = receiver.take_within(DEADLINE_S)
            assert arrived.batch == batch
            assert {t.device.type for t in arrived.tensors} == {"cuda"}
            assert arrived.tensors[0].unique().tolist() == [batch]
            assert arrived.tensors[1].tolist() == [batch]


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrowed_message_is_float32_again_on_the_gpu(kind: str) -> None:
    with ends(kind, 1 << 16, torch.bfloat16) as (sender, receiver):
        h = torch.randn(64, 100, device=GPU)
        sender.send(Message(Kind.GRADIENT, Item(0), 0, (h,)), DEADLINE_S)
        (arrived,) = receiver.take_within(DEADLINE_S).tensors
        assert torch.equal(arrived, h.bfloat16().float())


def test_the_memory_of_the_ring_is_pinned() -> None:
    with ends("shm", 1 << 16) as (sender, _):
        memory = sender._memories[0]  # type: ignore[attr-defined]
        assert torch.frombuffer(memory, dtype=torch.uint8).is_pinned()


def test_gloo_carries_tensors_of_the_gpu_through_pinned_memory() -> None:
    edge = ChannelSpec(Edge(0, 1, "activations", 0), "gloo", "x", "a 0->1", 2, 1 << 20, None, GPU, GPU)
    with Rendezvous.hosted() as rendezvous, ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        other = pool.submit(open_receiver, edge, lambda stage: None, rendezvous.join(DEADLINE_S), DEADLINE_S)
        sender = open_sender(edge, lambda stage: None, rendezvous.join(DEADLINE_S), DEADLINE_S)
        receiver = other.result(DEADLINE_S)
        stack.callback(lambda: list(pool.map(lambda end: end.close(), (sender, receiver))))
        for batch in range(20):
            payload = (torch.full((9_999,), batch, device=GPU),)
            sender.send(Message(Kind.ACTIVATION, Item(batch), 0, payload), DEADLINE_S)
            (arrived,) = receiver.take_within(DEADLINE_S).tensors
            assert (arrived.device.type, arrived.unique().tolist()) == ("cuda", [batch])


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_received_beside_the_computing_and_the_spans_show_it(kind: str, tmp_path: Path) -> None:
    """With the device at rest, computing waits for the whole copy; with work queued before, for what is left of it."""
    size = 256 << 20
    name = f"{new_prefix()}-s"
    board = StatusTable(name, 1, create=True)
    record = GpuSpanRecorder(0, board, tmp_path / "spans.npy", CudaMarks(GPU))
    matrix = torch.randn(8192, 8192, device=GPU)
    with ends(kind, size + 4096) as (sender, receiver):
        message = Message(Kind.ACTIVATION, Item(0), 0, (torch.ones(size // 4, device=GPU),))
        for batch in range(6):  # the first two warm up
            sender.send(message, DEADLINE_S)
            while receiver.depth() == 0 or not _posted(receiver):
                pass
            torch.cuda.synchronize()
            record(Span.BACKWARD, batch)
            for _ in range(40 if batch % 2 else 0):
                matrix @ matrix
            record(Span.RECEIVE, batch)
            receiver.copied(receiver.receive(DEADLINE_S))
            record(Span.OTHER, batch)
            torch.cuda.synchronize()
    record.close()
    StatusTable.unlink_name(name)
    board.close()
    spans = Spans(np.load(tmp_path / "spans.npy", allow_pickle=False))
    lengths = {
        batch: float((spans.end_ns - spans.start_ns)[(spans.span == Span.RECEIVE) & (spans.batch == batch)].sum())
        for batch in range(2, 6)
    }
    assert max(lengths[3], lengths[5]) < min(lengths[2], lengths[4]) / 2, lengths


def _posted(receiver: Receiver) -> bool:
    """Whether a message can be received: its bytes have come."""
    return bool(receiver._filled.value)  # type: ignore[attr-defined]


@pytest.mark.processes
def test_two_ranks_of_torchrun_share_the_gpu(tmp_path: Path) -> None:
    """As many ranks as GPUs would have the device of their local rank."""
    arguments = ["train", "digits", "--steps", "60", "--device", "cuda", "--json", "result.json", "--name", "r"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch", *arguments]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(ranks, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "cuda:0" in done.stdout
    assert "CUDA peer memory" in done.stdout
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] > 0.5


@pytest.mark.gpu(2)
@pytest.mark.processes
def test_two_gpus_reach_each_others_memory(tmp_path: Path) -> None:
    truth = _alone(problems.recipe(), locked(1))
    result = trained(problems.recipe, locked(2), tmp_path)
    assert result.resolved.devices == ("cuda:0", "cuda:1")
    assert_same(load_file(result.run_dir / "model.safetensors"), truth)


# ---------------------------------------------------------------- NCCL


@pytest.mark.gpu(2)
@pytest.mark.processes
def test_locked_workers_on_two_gpus_over_nccl_equal_a_plain_loop_bit_for_bit(
    alone: dict[str, Tensor], tmp_path: Path
) -> None:
    result = trained(problems.recipe, locked(2, channels="nccl"), tmp_path)
    assert result.resolved.devices == ("cuda:0", "cuda:1")
    assert [(choice.kind, choice.why) for choice in result.resolved.channels] == [("nccl", "as asked for")]
    assert_same(load_file(result.run_dir / "model.safetensors"), alone)


@pytest.mark.gpu(2)
@pytest.mark.processes
def test_a_wire_dtype_is_narrowed_before_nccl_sends_it(tmp_path: Path) -> None:
    plan = locked(2, channels="nccl", channel=ChannelPlan(wire_dtype="bf16"))
    with deterministic():
        truth = run_reference(problems.recipe(), plan).state_tensors()
    result = trained(problems.recipe, plan, tmp_path)
    assert_same(load_file(result.run_dir / "model.safetensors"), {name: t.cpu() for name, t in truth.items()})


@pytest.mark.gpu(2)
@pytest.mark.processes
@pytest.mark.parametrize("mode", ["1f1b", "async-1f1b", "unlocked"])
def test_what_keeps_several_batches_in_flight_learns_over_nccl(mode: str, tmp_path: Path) -> None:
    plan = Plan(mode=mode, stages=2, sizes=(4, 4), steps=60, device="cuda", channels="nccl")
    result = trained(problems.recipe, replace(plan, microbatches=4) if mode == "1f1b" else plan, tmp_path)
    assert sum(result.losses[-10:]) < sum(result.losses[:10])


@pytest.mark.gpu(2)
@pytest.mark.processes
@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_replicas_on_two_gpus_average_over_nccl(mode: str, tmp_path: Path) -> None:
    plan = Plan(mode=mode, stages=1, replicas=2, steps=40, device="cuda", channels="nccl")
    result = trained(problems.recipe, plan, tmp_path)
    assert sum(result.losses[-10:]) < sum(result.losses[:10])


@pytest.mark.gpu(2)
@pytest.mark.processes
@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_a_worker_killed_under_nccl_ends_the_run_with_our_error(mode: str, tmp_path: Path) -> None:
    """Not with that of NCCL's watchdog, which would come after ten minutes and end the other worker without a word."""
    plan = Plan(mode=mode, stages=2, sizes=(2, 2), steps=100_000, device="cuda", channels="nccl")
    begin = time.monotonic()
    with pytest.raises(RunFailed, match="was killed by SIGKILL, forward of batch 5"):
        train(
            model=partial(problems.suicidal, int(signal.SIGKILL)),
            batches=problems.batch,
            loss=F.cross_entropy,
            plan=plan,
            runs=tmp_path,
            quiet=True,
        )
    assert time.monotonic() - begin < 50, "else it ended as a stall, after 60 s"


@pytest.mark.gpu(2)
def test_messages_over_nccl_arrive_in_order_and_what_was_sent_may_be_changed_at_once() -> None:
    edge = ChannelSpec(Edge(0, 1, "activations", 0), "nccl", "", "a 0->1", 2, 1 << 26, None, GPU, "cuda:1")
    with Rendezvous.hosted() as rendezvous, ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        other = pool.submit(open_receiver, edge, lambda stage: None, rendezvous.join(DEADLINE_S), DEADLINE_S)
        sender = open_sender(edge, lambda stage: None, rendezvous.join(DEADLINE_S), DEADLINE_S)
        receiver = other.result(DEADLINE_S)
        stack.callback(lambda: list(pool.map(lambda end: end.close(), (sender, receiver))))
        sizes = [1, 9_999, 16_000_000, 0, 50_000] * 6

        def send() -> None:
            tensor = torch.empty(max(sizes), device=GPU)
            for batch, size in enumerate(sizes):
                tensor[:size] = batch
                sender.send(Message(Kind.ACTIVATION, Item(batch), 0, (tensor[:size],)), DEADLINE_S)
                tensor.fill_(-1)

        sending = pool.submit(send)
        for batch, size in enumerate(sizes):
            message = receiver.take_within(DEADLINE_S)
            assert (message.batch, message.tensors[0].device) == (batch, torch.device("cuda:1"))
            assert torch.equal(message.tensors[0].cpu(), torch.full((size,), float(batch)))
        sending.result(DEADLINE_S)


@pytest.mark.gpu(2)
@pytest.mark.processes
def test_a_hop_between_two_gpus_is_measured_over_nccl_too() -> None:
    rows = bench_channel(sizes=(4, 1 << 20), rounds=1, devices=(GPU, "cuda:1"))
    assert {row.channel for row in rows} == {"shared memory", "gloo", "CUDA peer memory", "NCCL"}
    assert all(row.hop_p50_us.median > 0 and row.gb_per_s.median > 0 for row in rows)
