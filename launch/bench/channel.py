"""`freewheel bench channel`: how long one hop between two workers takes, and how much goes through.

    pinger (process 1) -- there --> ponger (process 2)      latency: there and back, halved
                       <-- back ---                         throughput: a stream there, one message back

Channels, sizes and rounds are interleaved: a slow minute of the machine hits all alike. Gloo runs over the loopback
interface, so its rows show what it costs without a network. On a GPU a message counts as received when it is there for
computing: shared memory and gloo carry it through pinned memory of the host.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from launch.bench.rivals.child import Child, ChildDied, ending
from launch.bench.spread import Spread
from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message, layout_of
from pipeline.plan.channel_choice import CHANNELS, obstacle
from pipeline.plan.device_choice import CPU
from pipeline.plan.topology import Edge
from workers.channels.gpu.nccl import nccl_here
from workers.channels.interface import Receiver, Sender
from workers.channels.net.gloo import Rendezvous
from workers.channels.shm.ring import new_prefix
from workers.processes.claim_gpu import claim, finish
from workers.wiring.edges import ChannelSpec, open_receiver, open_sender
from workers.wiring.run_memory import rings

__all__ = ["SIZES", "ChannelRow", "bench_channel", "print_rows"]

SIZES = (4, 4 << 10, 256 << 10, 1 << 20, 8 << 20)
_STEP_DEADLINE_S = 20.0  # for one message; the whole has a deadline of its own
_NUM_WARM_UP = 20
_NUM_PINGS = 300


@dataclass(frozen=True, kw_only=True)
class ChannelRow:
    """What was measured for one channel and one size of message.

    Attributes:
        message_bytes: payload: one float32 tensor.
        hop_p50_us: median time of one hop in microseconds: half of there and back.
        hop_p99_us: 99th percentile of the same.
        gb_per_s: payload streamed one way in 1e9 bytes per second: one copy in, read in place, released.
    """

    channel: str
    message_bytes: int
    rounds: int
    hop_p50_us: Spread
    hop_p99_us: Spread
    gb_per_s: Spread


def bench_channel(
    sizes: Sequence[int] = SIZES,
    rounds: int = 5,
    slots: int = 4,
    deadline_s: float = 180.0,
    devices: tuple[str, str] = (CPU, CPU),
) -> list[ChannelRow]:
    """Measure every kind of channel between two fresh processes with one compute thread each: a row per kind and size.

    Blocks for ``deadline_s`` at most, and leaves nothing behind. ``devices`` are those of the two processes' tensors.

    Raises:
        ValueError: a size is not a positive multiple of 4, or rounds is below 1.
        PlanError: too little shared memory.
        RuntimeError: a process failed or died.
        TimeoutError: the deadline passed.
    """
    if rounds < 1 or not sizes or any(size < 4 or size % 4 for size in sizes):
        raise ValueError(f"sizes must be positive multiples of 4 and rounds at least 1, not {sizes}, {rounds}")
    end = time.monotonic() + deadline_s
    tracks = _tracks(new_prefix(), sizes, slots, devices)
    both: list[Child] = []
    channels = [channel for track in tracks for channel in (track.there, track.back)]
    with Rendezvous.hosted() as meet, rings(channels) as unlink, ending(both):
        for name, work in (("pinger", _ping), ("ponger", _pong)):
            both.append(Child(name, work, tracks, meet, rounds))
        said: list[Any] = []
        while len(said) < 3:  # both have attached; then the pinger's samples
            ready: Sequence[Any] = wait(both, max(0.0, end - time.monotonic()))  # type: ignore[arg-type]
            if not ready:
                raise TimeoutError("the channel benchmark did not finish before its deadline")
            try:
                said += [child.take() for child in ready]
            except ChildDied as died:
                raise RuntimeError(f"a process of the channel benchmark {died}") from None
            if len(said) == 2:
                unlink()  # nothing stays behind, whatever happens from here on
    return [_row(track, samples) for track, samples in zip(tracks, said[-1], strict=True)]


def print_rows(rows: Sequence[ChannelRow], console: Console | None = None) -> None:
    """Print a table per channel: medians of the rounds, with the smallest and the largest."""
    console = console or Console()
    for channel in dict.fromkeys(row.channel for row in rows):
        columns = [Column(heading, justify="right") for heading in ("message", "p50 us", "p99 us", "GB/s")]
        table = Table(*columns, title=f"one hop, {channel}, {rows[0].rounds} rounds: median (min to max)")
        for row in (row for row in rows if row.channel == channel):
            table.add_row(_readable(row.message_bytes), *map(_spread, (row.hop_p50_us, row.hop_p99_us, row.gb_per_s)))
        console.print(table)


@dataclass(frozen=True)
class _Track:
    """A size of message on a kind of channel, and the channels it takes."""

    kind: str
    size: int
    there: ChannelSpec
    back: ChannelSpec


def _tracks(prefix: str, sizes: Sequence[int], slots: int, devices: tuple[str, str]) -> tuple[_Track, ...]:
    def channel(way: str, source: int, kind: str, i: int, size: int) -> ChannelSpec:
        name, label = f"{prefix}-{kind[0]}{i}{way[0]}", f"{way} ({kind}, {size} bytes)"  # ends over gloo meet under it
        ends, size = (devices[source], devices[1 - source]), layout_of(_message(size)).total_bytes
        return ChannelSpec(Edge(source, 1 - source, "activations", 0), kind, name, label, slots, size, None, *ends)

    return tuple(
        _Track(kind, size, channel("there", 0, kind, i, size), channel("back", 1, kind, i, size))
        for kind in CHANNELS
        if (kind != "nccl" or nccl_here()) and obstacle(kind, *(("here", device) for device in devices)) is None
        for i, size in enumerate(sizes)
    )


def _attached(pipe: Connection, tracks: Sequence[_Track], meet: Rendezvous, place: int) -> tuple[str, list[Any]]:
    """The device of the pinger (place 0) or the ponger (1), and its ends (there, back) of every track."""
    torch.set_num_threads(1)
    device = (tracks[0].there.source_device, tracks[0].there.target_device)[place]
    claim(device)
    meeting, doors = meet.join(_STEP_DEADLINE_S), (open_sender, open_receiver)

    def opened(channel: ChannelSpec, door: int) -> Sender | Receiver:
        return doors[door](channel, lambda stage: None, meeting, _STEP_DEADLINE_S)  # no bell: one channel at a time

    ends = [(opened(track.there, place), opened(track.back, 1 - place)) for track in tracks]
    pipe.send("attached")
    return device, ends


def _ping(pipe: Connection, tracks: Sequence[_Track], meet: Rendezvous, rounds: int) -> None:
    """Says, by track and round, (p50 us, p99 us, GB/s)."""
    device, ends = _attached(pipe, tracks, meet, 0)
    samples: list[list[tuple[float, float, float]]] = [[] for _ in tracks]
    for _ in range(rounds):
        for found, track, (there, back) in zip(samples, tracks, ends, strict=True):
            message, count = _message(track.size, device), _num_streamed(track.size)
            hops_us = [_seconds(there, back, message, 1, device) / 2 * 1e6 for _ in range(_NUM_PINGS)]
            hops_us = sorted(hops_us[_NUM_WARM_UP:])
            p50, p99 = (hops_us[int(share * len(hops_us))] for share in (0.50, 0.99))
            found.append((p50, p99, track.size * count / _seconds(there, back, message, count) / 1e9))
    pipe.send(samples)


def _pong(pipe: Connection, tracks: Sequence[_Track], meet: Rendezvous, rounds: int) -> None:
    """Echoes the pings, swallows the stream and confirms it."""
    device, ends = _attached(pipe, tracks, meet, 1)
    for _ in range(rounds):
        for track, (there, back) in zip(tracks, ends, strict=True):
            for _ in range(_NUM_PINGS):
                back.send(there.receive(_STEP_DEADLINE_S), _STEP_DEADLINE_S)
                there.release()
            for _ in range(_num_streamed(track.size)):
                there.receive(_STEP_DEADLINE_S)
                there.release()
            finish(device)
            back.send(_message(4, device), _STEP_DEADLINE_S)


def _seconds(there: Sender, back: Receiver, message: Message, count: int, finished: str = CPU) -> float:
    """From the first of ``count`` messages to the answer, and until the device has it."""
    start = time.perf_counter()
    for _ in range(count):
        there.send(message, _STEP_DEADLINE_S)
    back.receive(_STEP_DEADLINE_S)
    back.release()
    finish(finished)
    return time.perf_counter() - start


def _message(size: int, device: str = CPU) -> Message:
    return Message(Kind.ACTIVATION, Item(0), stage=0, payload=(torch.zeros(size // 4, device=device),))


def _num_streamed(size: int) -> int:
    return max(32, min(2000, (512 << 20) // size))


def _row(track: _Track, samples: Sequence[tuple[float, float, float]]) -> ChannelRow:
    names = ("hop_p50_us", "hop_p99_us", "gb_per_s")
    figures = {name: Spread.of(values) for name, values in zip(names, zip(*samples, strict=True), strict=True)}
    return ChannelRow(channel=CHANNELS[track.kind], message_bytes=track.size, rounds=len(samples), **figures)


def _spread(spread: Spread) -> str:
    median, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.2g}" for x in (spread.median, spread.min, spread.max))
    return f"{median} ({low} to {high})"


def _readable(num_bytes: int) -> str:
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g} {unit}"
    return f"{num_bytes} B"
