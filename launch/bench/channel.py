"""`freewheel bench channel`: how long one hop between two workers takes, and how much goes through.

    pinger (process 1) -- there --> ponger (process 2)      latency: there and back, halved
                       <-- back ---                         throughput: a stream there, one message back

Channels, sizes and rounds are interleaved, so that a slow minute of the machine hits all alike. Gloo runs over the
loopback interface here, so its rows show what it costs by itself, without a network; NCCL between two GPUs takes the
way between them that it finds fastest. On a GPU a message counts as received when it is there for computing: shared
memory and gloo then carry it through pinned memory of the host.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from launch.bench.spread import Spread
from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message, layout_of
from pipeline.plan.channel_choice import CHANNELS, obstacle
from pipeline.plan.device_choice import CPU
from pipeline.plan.topology import Edge
from workers.channels.gpu.nccl import nccl_here
from workers.channels.interface import Receiver, Sender
from workers.channels.net.gloo import Meeting, Rendezvous
from workers.channels.shm.ring import new_prefix
from workers.processes.claim_gpu import claim, finish
from workers.processes.context import process_context
from workers.wiring.edges import ChannelSpec, open_receiver, open_sender
from workers.wiring.run_memory import rings

__all__ = ["SIZES", "ChannelRow", "bench_channel", "print_rows"]

SIZES = (4, 4 << 10, 256 << 10, 1 << 20, 8 << 20)
_STEP_DEADLINE_S = 20.0  # for one message; the whole has a deadline of its own
_NUM_WARM_UP = 20
_NUM_PINGS = 300
_STREAM_BYTES = 512 << 20
_WAYS = {"there": (0, 1), "back": (1, 0)}


@dataclass(frozen=True, kw_only=True)
class ChannelRow:
    """What was measured for one channel and one size of message.

    Attributes:
        channel: the implementation.
        message_bytes: payload: one float32 tensor.
        rounds: how often it was measured.
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

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        return asdict(self)


def bench_channel(
    sizes: Sequence[int] = SIZES,
    rounds: int = 5,
    slots: int = 4,
    deadline_s: float = 180.0,
    devices: tuple[str, str] = (CPU, CPU),
) -> list[ChannelRow]:
    """Measure every kind of channel between two fresh processes with one compute thread each.

    Args:
        sizes: bytes of each message, multiples of 4.
        rounds: how often everything is measured, interleaved.
        slots: slots of each channel.
        deadline_s: for everything together, in seconds.
        devices: where the two processes have their tensors.

    Returns:
        one row per kind of channel and size.

    Raises:
        ValueError: a size is not a positive multiple of 4, or rounds is below 1.
        PlanError: too little shared memory.
        RuntimeError: a process failed or died.
        TimeoutError: the deadline passed.

    Blocks:
        until measured, at most ``deadline_s``. It leaves no process and no shared memory.
    """
    if rounds < 1 or not sizes or any(size < 4 or size % 4 for size in sizes):
        raise ValueError(f"sizes must be positive multiples of 4 and rounds at least 1, not {sizes}, {rounds}")
    end = time.monotonic() + deadline_s
    tracks = _tracks(new_prefix(), sizes, slots, devices)
    with Rendezvous.hosted() as meet:
        samples = _measured(tracks, meet, rounds, end)
    return [_row(track, samples[i]) for i, track in enumerate(tracks)]


def print_rows(rows: Sequence[ChannelRow], console: Console | None = None) -> None:
    """Print a table per channel: medians of the rounds, with the smallest and the largest."""
    console = console or Console()
    for channel in dict.fromkeys(row.channel for row in rows):
        table = Table(title=f"one hop, {channel}, {rows[0].rounds} rounds: median (min to max)")
        for heading in ("message", "p50 us", "p99 us", "GB/s"):
            table.add_column(heading, justify="right")
        for row in (row for row in rows if row.channel == channel):
            figures = (row.hop_p50_us, row.hop_p99_us, row.gb_per_s)
            table.add_row(_readable(row.message_bytes), *(_spread(figure) for figure in figures))
        console.print(table)


def _measured(
    tracks: Sequence[_Track], meet: Rendezvous, rounds: int, end: float
) -> list[list[tuple[float, float, float]]]:
    context = process_context(__name__)
    from_ping, to_us = context.Pipe(duplex=False)
    from_pong, to_us_too = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_ping, args=(tracks, meet, rounds, to_us), daemon=True),
        context.Process(target=_pong, args=(tracks, meet, rounds, to_us_too), daemon=True),
    ]
    channels = [channel for track in tracks for channel in (track.there, track.back)]
    with from_ping, from_pong, to_us, to_us_too, rings(channels) as unlink, _running(processes):
        _report(from_ping, processes, end)
        _report(from_pong, processes, end)
        unlink()  # both have attached: nothing stays behind, whatever happens from here on
        samples: list[list[tuple[float, float, float]]] = _report(from_ping, processes, end)
        return samples


@dataclass(frozen=True)
class _Track:
    """A size of message on a kind of channel, and the channels it takes."""

    kind: str
    size: int
    there: ChannelSpec
    back: ChannelSpec


def _tracks(prefix: str, sizes: Sequence[int], slots: int, devices: tuple[str, str]) -> tuple[_Track, ...]:
    def channel(kind: str, way: str, i: int, size: int) -> ChannelSpec:
        name, (source, target) = f"{prefix}-{kind[0]}{i}{way[0]}", _WAYS[way]
        label = f"{way} ({kind}, {size} bytes)"  # ends over gloo find each other by it
        ends, size = (devices[source], devices[target]), layout_of(_message(size)).total_bytes
        return ChannelSpec(Edge(source, target, "activations", 0), kind, name, label, slots, size, None, *ends)

    return tuple(
        _Track(kind, size, channel(kind, "there", i, size), channel(kind, "back", i, size))
        for kind in CHANNELS
        if (kind != "nccl" or nccl_here()) and obstacle(kind, *(("here", device) for device in devices)) is None
        for i, size in enumerate(sizes)
    )


@contextlib.contextmanager
def _running(processes: Sequence[BaseProcess]) -> Iterator[None]:
    resource_tracker.ensure_running()  # its own start would unblock the signal below
    try:
        # Processes inherit the mask: Ctrl-C reaches every process of a terminal, and the parent ends these.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for process in processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join(10)


def _report(connection: Connection, processes: Sequence[BaseProcess], end: float) -> Any:
    """The next report of a process; raises when one of them died or the time is up."""
    while not connection.poll():
        alive = [process.sentinel for process in processes if process.exitcode is None]
        if not wait([connection, *alive], max(0.0, end - time.monotonic())):
            raise TimeoutError("the channel benchmark did not finish before its deadline")
        for process in processes:
            if process.exitcode:
                raise RuntimeError(f"process {process.pid} of the benchmark died, exit code {process.exitcode}")
    return connection.recv()


def _ping(tracks: Sequence[_Track], meet: Rendezvous, rounds: int, parent: Connection) -> None:
    """Report "attached", then by track and round (p50 us, p99 us, GB/s)."""
    torch.set_num_threads(1)
    device = tracks[0].there.source_device
    claim(device)
    meeting = meet.join(_STEP_DEADLINE_S)
    ends = [(_sender(track.there, meeting), _receiver(track.back, meeting)) for track in tracks]
    parent.send("attached")
    samples: list[list[tuple[float, float, float]]] = [[] for _ in tracks]
    for _ in range(rounds):
        for i, (track, (there, back)) in enumerate(zip(tracks, ends, strict=True)):
            message, count = _message(track.size, device), _num_streamed(track.size)
            hops_us = [_round_trip_s(there, back, message, device) / 2 * 1e6 for _ in range(_NUM_PINGS)]
            hops_us = sorted(hops_us[_NUM_WARM_UP:])
            p50, p99 = (hops_us[int(share * len(hops_us))] for share in (0.50, 0.99))
            samples[i].append((p50, p99, track.size * count / _stream_s(there, back, message, count) / 1e9))
    parent.send(samples)


def _pong(tracks: Sequence[_Track], meet: Rendezvous, rounds: int, parent: Connection) -> None:
    """The mirror image of `_ping`: echo the pings, swallow the stream and confirm it."""
    torch.set_num_threads(1)
    device = tracks[0].there.target_device
    claim(device)
    meeting = meet.join(_STEP_DEADLINE_S)
    ends = [(_receiver(track.there, meeting), _sender(track.back, meeting)) for track in tracks]
    parent.send("attached")
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


def _round_trip_s(there: Sender, back: Receiver, message: Message, device: str) -> float:
    start = time.perf_counter()
    there.send(message, _STEP_DEADLINE_S)
    back.receive(_STEP_DEADLINE_S)
    back.release()
    finish(device)
    return time.perf_counter() - start


def _stream_s(there: Sender, back: Receiver, message: Message, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        there.send(message, _STEP_DEADLINE_S)
    back.receive(_STEP_DEADLINE_S)
    back.release()
    return time.perf_counter() - start


def _sender(channel: ChannelSpec, meeting: Meeting) -> Sender:
    return open_sender(channel, _no_bell, meeting, _STEP_DEADLINE_S)


def _receiver(channel: ChannelSpec, meeting: Meeting) -> Receiver:
    return open_receiver(channel, _no_bell, meeting, _STEP_DEADLINE_S)


def _no_bell(stage: int) -> None:
    """Whoever has one channel at a time waits on it."""


def _message(size: int, device: str = CPU) -> Message:
    return Message(Kind.ACTIVATION, Item(0), stage=0, payload=(torch.zeros(size // 4, device=device),))


def _num_streamed(size: int) -> int:
    return max(32, min(2000, _STREAM_BYTES // size))


def _row(track: _Track, samples: Sequence[tuple[float, float, float]]) -> ChannelRow:
    p50, p99, rate = (
        Spread(median=statistics.median(figures), min=min(figures), max=max(figures))
        for figures in zip(*samples, strict=True)
    )
    return ChannelRow(
        channel=CHANNELS[track.kind],
        message_bytes=track.size,
        rounds=len(samples),
        hop_p50_us=p50,
        hop_p99_us=p99,
        gb_per_s=rate,
    )


def _spread(spread: Spread) -> str:
    median, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.2g}" for x in (spread.median, spread.min, spread.max))
    return f"{median} ({low} to {high})"


def _readable(num_bytes: int) -> str:
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g} {unit}"
    return f"{num_bytes} B"
