"""What only the shared memory ring promises: names, reserved memory, nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console

from launch.bench.channel import SIZES, _tracks, bench_channel, print_rows
from pipeline.errors import PlanError
from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message
from pipeline.plan.device_choice import CPU
from pipeline.plan.topology import Edge
from workers.channels.errors import ChannelTimeout
from workers.channels.shm.host_memory import check_shared_memory, sweep_stale
from workers.channels.shm.ring import ShmReceiver, ShmSender, create_ring, new_prefix, ring_bytes, unlink_ring
from workers.channels.spec import ChannelSpec, Opening

DEADLINE_S = 20.0
LABEL = "activations 0->1"


def entries(prefix: str) -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob(f"*{prefix}*"))


@pytest.fixture
def name() -> Iterator[str]:
    name = f"{new_prefix()}-a0"
    yield name
    unlink_ring(name)
    assert not entries(f"fw-{os.getpid()}-")


def opened(name: str, within_s: float = DEADLINE_S) -> tuple[ChannelSpec, Opening]:
    return ChannelSpec(Edge(0, 1, "activations", 0), "shm", name, LABEL, 1, 64), Opening(within_s)


def ends(name: str) -> tuple[ShmSender, ShmReceiver]:
    return (
        ShmSender(*opened(name)),
        ShmReceiver(*opened(name)),
    )


def message(*tensors: torch.Tensor) -> Message:
    return Message(Kind.ACTIVATION, Item(1), 0, tensors)


def test_names_are_short_and_start_with_the_drivers_pid() -> None:
    prefix = new_prefix()
    assert prefix.startswith(f"fw-{os.getpid()}-")
    assert len(f"/fw-{2**22}-{prefix.split('-')[2]}-a63-f") <= 31
    assert prefix != new_prefix()


def test_names_can_go_as_soon_as_both_ends_have_attached(name: str) -> None:
    create_ring(name, 2, 1024)
    assert entries(name) == sorted([name, f"sem.{name}-e", f"sem.{name}-f"])
    sender = ShmSender(*opened(name))
    receiver = ShmReceiver(*opened(name))
    unlink_ring(name)
    unlink_ring(name)
    assert not entries(name)
    with sender, receiver:
        for _ in range(5):
            sender.send(message(torch.arange(8)), DEADLINE_S)
            assert receiver.take_within(DEADLINE_S).tensors[0].sum() == 28


def test_reading_in_place_copies_nothing(name: str) -> None:
    create_ring(name, 1, 1024)
    sender, receiver = ends(name)
    with sender, receiver:
        sender.send(message(torch.zeros(4)), DEADLINE_S)
        in_place = receiver.receive(DEADLINE_S).tensors[0]
        receiver.release()
        sender.send(message(torch.ones(4)), DEADLINE_S)
        assert in_place.sum() == 4  # the slot's memory itself: hence the rule about release


def test_each_end_is_attached_once(name: str) -> None:
    create_ring(name, 1, 1024)
    sender, receiver = ends(name)
    with sender, receiver, pytest.raises(ValueError, match="attached already"):
        ShmSender(*opened(name))


def test_attaching_to_nothing_says_so(name: str) -> None:
    with pytest.raises(ChannelTimeout, match=rf"activations 0->1: no shared memory ring '{name}' after 0\.01 s"):
        ShmReceiver(*opened(name, 0.01))


def test_a_name_is_made_once(name: str) -> None:
    create_ring(name, 1, 64)
    with pytest.raises(FileExistsError, match=name):
        create_ring(name, 1, 64)
    assert len(entries(name)) == 3


def test_a_message_larger_than_its_slot_gets_both_sizes_and_the_remedy(name: str) -> None:
    create_ring(name, 1, 1000)
    sender, receiver = ends(name)
    with sender, receiver:
        with pytest.raises(ValueError, match=r"4,096 bytes does not fit its slot of 1,024 bytes; make") as caught:
            sender.send(message(torch.zeros(1000)), DEADLINE_S)
        assert caught.value.__notes__ == ["while sending on activations 0->1"]
        assert sender.room()


def test_too_little_shared_memory_is_refused_in_one_sentence(name: str) -> None:
    enough = ring_bytes(2, 1 << 20)
    check_shared_memory(enough)
    sentence = r"need .* MiB .* free in /dev/shm\. Use fewer slots, a smaller batch"
    with pytest.raises(PlanError, match=sentence):
        check_shared_memory(1 << 60)
    with pytest.raises(PlanError, match=sentence):
        create_ring(name, 1 << 20, 1 << 40)
    with pytest.raises(PlanError, match="at least 1 slot"):
        create_ring(name, 0, 64)


def test_memory_that_somebody_else_took_meanwhile_is_refused_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlanError, match="too little shared memory"):
        create_ring(name, 1, 64)
    assert not entries(name)


def test_a_small_dev_shm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class State(NamedTuple):
        f_bavail: int = 1000
        f_frsize: int = 4096

    monkeypatch.setattr(os, "statvfs", lambda _: State())
    check_shared_memory(4_096_000)
    with pytest.raises(PlanError, match=r"\(4,096,001 bytes\), 3\.9 MiB \(4,096,000 bytes\) are free"):
        check_shared_memory(4_096_001)


def test_the_sweep_takes_what_the_dead_left_and_nothing_else(name: str) -> None:
    create_ring(name, 1, 64)
    driver = subprocess.Popen([sys.executable, "-c", ""])
    driver.wait(DEADLINE_S)
    tag = new_prefix().split("-")[2][:4]
    dead = f"fw-{driver.pid}-{tag}{uuid.uuid4().hex[:6]}-a0"
    create_ring(dead, 1, 64)
    foreign = Path("/dev/shm", f"fw-{driver.pid}-{(int(tag, 16) + 1) % 2**16:04x}aaaaaa-a0")
    foreign.touch()
    try:
        removed = sweep_stale()
        assert {dead, f"sem.{dead}-e", f"sem.{dead}-f"} <= set(removed)
        assert not entries(dead)
        assert len(entries(name)) == 3  # its driver lives
        assert foreign.exists()  # another container's
    finally:
        unlink_ring(dead)
        foreign.unlink()


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, Path.touch, lambda path: path.symlink_to("/etc/passwd"), lambda path: os.mkfifo(path)],
    ids=["a folder", "a file of somebody else", "a link", "a pipe"],
)
def test_what_a_stranger_puts_under_such_a_name_is_left_alone(
    make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder, or a process number beyond 64 bits, ended every run of the host in a traceback."""
    user, tag = os.geteuid(), new_prefix().split("-")[2][:4]
    strange = Path("/dev/shm", f"fw-999999999-{tag}{uuid.uuid4().hex[:6]}")
    endless = strange.with_name(strange.name.replace("999999999", "9" * 30))
    make(strange)
    endless.touch()
    monkeypatch.setattr(os, "geteuid", lambda: user + (make is Path.touch))
    try:
        assert not {strange.name, endless.name} & set(sweep_stale())
        assert os.path.lexists(strange)
        assert endless.exists()
    finally:
        endless.unlink()
        strange.rmdir() if make is Path.mkdir else strange.unlink()


def test_every_channel_of_the_benchmark_has_a_label_of_its_own() -> None:
    """Those of all sizes once met under one, and the ends over gloo waited for each other's greeting in vain."""
    labels = [edge.label for track in _tracks("x", SIZES, 4, (CPU, CPU)) for edge in (track.there, track.back)]
    assert len(set(labels)) == len(labels) == 2 * 2 * len(SIZES)


@pytest.mark.processes
def test_the_benchmark_measures_and_leaves_nothing() -> None:
    rows = bench_channel(sizes=(4096,), rounds=1, deadline_s=60)
    assert [(row.channel, row.message_bytes) for row in rows] == [("shared memory", 4096), ("gloo", 4096)]
    assert all(0 < row.hop_p50_us.median <= row.hop_p99_us.median and row.gb_per_s.min > 0 for row in rows)
    assert asdict(rows[0])["hop_p50_us"].keys() == {"median", "min", "max"}
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_rows(rows, console)
    console.file.close()
    text = console.export_text()
    assert all(word in text for word in ("4 KiB", "shared memory", "gloo"))
    assert not entries(f"fw-{os.getpid()}-")
    with pytest.raises(ValueError, match="multiples of 4"):
        bench_channel(sizes=(3,))


@pytest.mark.processes
def test_the_benchmark_gives_up_at_its_deadline() -> None:
    with pytest.raises(TimeoutError, match="deadline"):
        bench_channel(sizes=(4,), rounds=1, deadline_s=0.01)
    assert not entries(f"fw-{os.getpid()}-")
