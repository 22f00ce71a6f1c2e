"""Whole runs over gloo: the same numbers as over shared memory, and failures that name their cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import problems
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same

from launch import RunFailed, train
from launch.recipes.digits import digits
from launch.results.result import Result
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import ChannelPlan, Plan, PlanError, Recipe, run_reference
from pipeline.plan.channel_choice import choose_channels
from pipeline.plan.check import check_plan
from pipeline.plan.topology import Edge
from workers.channels.errors import ChannelTimeout
from workers.channels.net.ends import RemoteReceiver, RemoteSender
from workers.channels.net.gloo import Pair, Rendezvous
from workers.channels.spec import ChannelSpec, Opening

UNSEEN_S = 50.0
"""Before a failure that nobody saw would end as a stall, after 60 s."""


def _run(source: partial[Recipe], plan: Plan, runs: Path, hosts: Sequence[str] | None = None) -> Result:
    return run(source, resolve_source(source, plan, hosts), runs, "run", Console(quiet=True), ["test"])


@pytest.mark.processes
@pytest.mark.parametrize(("sizes", "hosts"), [((3, 3), None), ((2, 2, 2), None), ((2, 2, 2), ("a", "a", "b"))])
def test_locked_training_over_gloo_equals_shared_memory_bit_for_bit(
    sizes: tuple[int, ...], hosts: Sequence[str] | None, tmp_path: Path
) -> None:
    """Digits; the last case has one cut in shared memory and one over gloo, so stage 1 waits on both at once."""
    source = partial(digits, hidden=32)
    plan = Plan(mode="naive", stages=len(sizes), sizes=sizes, steps=12)
    over_memory = _run(source, plan, tmp_path)
    over_gloo = _run(source, replace(plan, channels="auto" if hosts else "gloo"), tmp_path, hosts)
    kinds = [choice.kind for choice in over_gloo.resolved.channels]
    assert kinds == (["shm", "gloo"] if hosts else ["gloo"] * (len(sizes) - 1))
    assert_same(over_gloo.state_tensors(), over_memory.state_tensors())
    assert_same(over_gloo.optimizer_tensors(), over_memory.optimizer_tensors())
    assert over_gloo.losses == over_memory.losses
    assert over_gloo.accuracy == over_memory.accuracy


@pytest.mark.processes
def test_the_command_line_trains_over_gloo_and_says_so(tmp_path: Path) -> None:
    typed = "train digits --stages 2 --hidden 32 --steps 5 --channels gloo --channel.wire-dtype bf16 --name r --runs ."
    root = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-m", "launch", *typed.split()],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert "  channels   gloo, 4 slots  (as asked for)" in ended.stdout
    assert "  wire       bf16  (float32 is rounded on its way: half the bytes, not exact)" in ended.stdout
    written = json.loads((tmp_path / "r" / "plan.json").read_text())
    assert written["channels"] == [{"cut": 0, "replica": 0, "kind": "gloo", "why": "as asked for"}]


@pytest.mark.processes
@pytest.mark.parametrize("channels", ["shm", "gloo"])
def test_what_is_rounded_on_its_way_is_rounded_alike_everywhere(channels: str, tmp_path: Path) -> None:
    """Processes over either channel give the numbers of the reference driver, which are not those of float32."""
    exact = Plan(mode="naive", stages=3, sizes=(1, 5, 2), steps=8)
    plan = replace(exact, channel=ChannelPlan(wire_dtype="bf16"), channels=channels)
    mine, truth = _run(partial(problems.recipe), plan, tmp_path), run_reference(problems.recipe(), plan)
    assert_same(mine.state_tensors(), truth.state_tensors())
    assert mine.losses == truth.losses
    unrounded = run_reference(problems.recipe(), exact)
    assert mine.losses != unrounded.losses
    torch.testing.assert_close(torch.tensor(mine.losses), torch.tensor(unrounded.losses), rtol=0.05, atol=0.05)


@pytest.mark.processes
def test_deterministic_unlocked_runs_over_gloo_repeat_the_reference(tmp_path: Path) -> None:
    plan = Plan(stages=3, sizes=(1, 5, 2), steps=12, deterministic=True, targets="true", channels="gloo")
    mine, truth = _run(partial(problems.recipe), plan, tmp_path), run_reference(problems.recipe(), plan)
    assert_same(mine.state_tensors(), truth.state_tensors())
    assert mine.losses == truth.losses


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_the_stage_that_was_killed_is_named_not_the_one_that_saw_its_connection_break(
    mode: str, tmp_path: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(RunFailed, match="was killed by SIGKILL, forward of batch 5") as caught:
        train(
            model=partial(problems.suicidal, int(signal.SIGKILL)),
            batches=problems.batch,
            loss=F.cross_entropy,
            plan=Plan(mode=mode, stages=2, sizes=(2, 2), steps=100_000, channels="gloo"),
            runs=tmp_path,
            quiet=True,
        )
    assert caught.value.stage == 1
    assert time.monotonic() - start < UNSEEN_S


@pytest.mark.processes
def test_an_exception_travels_whole_and_its_consequences_do_not_hide_it(tmp_path: Path) -> None:
    plan = Plan(mode="naive", stages=3, sizes=(2, 2, 2), steps=1000, channels="gloo")
    start = time.monotonic()
    with pytest.raises(RunFailed, match="stage 2, layer 5, batch 5: ZeroDivisionError: as planned") as caught:
        train(
            model=problems.failing,
            batches=problems.batch,
            loss=F.cross_entropy,
            plan=plan,
            runs=tmp_path,
            quiet=True,
        )
    assert (caught.value.stage, caught.value.layer, caught.value.batch) == (2, "5", 5)
    assert time.monotonic() - start < UNSEEN_S


@pytest.mark.processes
def test_a_stopped_worker_is_reported_after_the_stall_limit(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RunFailed, match=r"no progress for 1\.5 s: stage 1") as caught:
        train(
            model=partial(problems.suicidal, int(signal.SIGSTOP)),
            batches=problems.batch,
            loss=F.cross_entropy,
            plan=Plan(mode="naive", stages=2, sizes=(2, 2), steps=100_000, stall_after_s=1.5, channels="gloo"),
            runs=tmp_path,
            quiet=True,
        )
    assert caught.value.stage == 1
    assert time.monotonic() - start < UNSEEN_S


# ---------------------------------------------------------------- the choice, and the meeting


def test_workers_of_one_host_share_memory_and_others_use_gloo() -> None:
    chosen = choose_channels("auto", ["a", "a", "b"])
    assert [(choice.kind, choice.why) for choice in chosen] == [
        ("shm", "both workers on one host"),
        ("gloo", "a and b are two hosts"),
    ]
    assert choose_channels("auto", ["a", "a"])[0].why == "all workers on this host"
    assert [choice.kind for choice in choose_channels("gloo", ["a", "a", "b"])] == ["gloo", "gloo"]
    assert choose_channels("shm", ["a"]) == ()
    with pytest.raises(
        PlanError, match="channels shm: the workers on both sides of cut 1 are on different hosts, a and"
    ):
        choose_channels("shm", ["a", "a", "b"])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(channels="glue"), "unknown channels 'glue'; did you mean 'gloo'? Valid: auto, shm, gloo, cuda, nccl."),  # type: ignore[arg-type]
        (
            Plan(channel=ChannelPlan(wire_dtype="bf61")),  # type: ignore[arg-type]
            "unknown wire dtype 'bf61'; did you mean 'bf16'? Valid: bf16.",
        ),
        (
            Plan(stages=1, channels="gloo"),
            "channels has no effect with 1 stage, which has no channels: leave it out.",
        ),
    ],
)
def test_a_plan_with_channels_that_cannot_be_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert caught.value.problems == (message,)


def test_a_meeting_where_nobody_comes_ends_at_its_deadline() -> None:
    with Rendezvous.hosted() as rendezvous:
        start = time.monotonic()
        with pytest.raises(ChannelTimeout, match=r"'lonely': the other side did not come within 0\.2 s"):
            Pair.join(rendezvous.join(5.0), "lonely", 0, 0.2)
        gone = rendezvous
    with pytest.raises(ChannelTimeout, match=rf"no store answered at 127\.0\.0\.1:{gone.port} within 0\.2 s"):
        gone.join(0.2)
    assert time.monotonic() - start < 60


def test_ends_that_do_not_agree_on_their_slots_refuse_each_other() -> None:
    """A message longer than the buffer that waits for it would end the receiving process."""
    two = ChannelSpec(Edge(0, 1, "activations", 0), "gloo", "e", "activations 0->1", 2, 640)
    with Rendezvous.hosted() as rendezvous, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(RemoteSender, two, Opening(10.0, meeting=rendezvous.join(10.0)))
        with pytest.raises(ValueError, match="the receiver has 3 slots of 704 bytes, the sender 2 of 704"):
            RemoteReceiver(replace(two, slots=3), Opening(10.0, meeting=rendezvous.join(10.0)))
        with pytest.raises(ValueError, match="the sender has 2 slots of 704 bytes, the receiver 3 of 704"):
            sending.result(20.0)
