"""`freewheel bench channel`: how long one hop between two workers takes, and how much goes through.

    pinger (process 1) -- there --> ponger (process 2)      latency: there and back, halved
                       <-- back ---                         throughput: a stream there, one message back

Sizes and rounds are interleaved, so that a slow minute of the machine hits every size alike.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from launch.spread import Spread
from pipeline.messages import Kind, Message, layout_of
from workers.channel import Receiver, Sender
from workers.processes import process_context
from workers.shm import (
    ShmReceiver,
    ShmSender,
    check_shared_memory,
    create_ring,
    new_prefix,
    ring_bytes,
    sweep_stale,
    unlink_ring,
)

__all__ = ["SIZES", "ChannelRow", "bench_channel", "print_rows"]

SIZES = (4, 4 << 10, 256 << 10, 1 << 20, 8 << 20)
_STEP_DEADLINE_S = 20.0  # for one message; the whole has a deadline of its own
_NUM_WARM_UP = 20
_NUM_PINGS = 300
_STREAM_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class ChannelRow:
    """What was measured for one size of message.

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
    sizes: Sequence[int] = SIZES, rounds: int = 5, slots: int = 4, deadline_s: float = 180.0
) -> list[ChannelRow]:
    """Measure the shared memory channel between two fresh processes with one thread each.

    Args:
        sizes: bytes of each message, multiples of 4.
        rounds: how often every size is measured, interleaved.
        slots: slots of each channel.
        deadline_s: for everything together, in seconds.

    Returns:
        one row per size.

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
    prefix = new_prefix()
    context = process_context(__name__)
    from_ping, to_us = context.Pipe(duplex=False)
    from_pong, to_us_too = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_ping, args=(prefix, tuple(sizes), rounds, to_us), daemon=True),
        context.Process(target=_pong, args=(prefix, tuple(sizes), rounds, to_us_too), daemon=True),
    ]
    with from_ping, from_pong, to_us, to_us_too, _rings(prefix, sizes, slots) as unlink, _running(processes):
        _report(from_ping, processes, end)
        _report(from_pong, processes, end)
        unlink()  # both have attached: nothing stays behind, whatever happens from here on
        samples = _report(from_ping, processes, end)
    return [_row(size, samples[i]) for i, size in enumerate(sizes)]


def print_rows(rows: Sequence[ChannelRow], console: Console | None = None) -> None:
    """Print the rows as a table: medians of the rounds, with the smallest and the largest."""
    title = f"one hop, {rows[0].channel}, {rows[0].rounds} rounds: median (min to max)" if rows else None
    table = Table(title=title)
    for heading in ("message", "p50 us", "p99 us", "GB/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = (row.hop_p50_us, row.hop_p99_us, row.gb_per_s)
        table.add_row(_readable(row.message_bytes), *(_spread(figure) for figure in figures))
    (console or Console()).print(table)


@contextlib.contextmanager
def _rings(prefix: str, sizes: Sequence[int], slots: int) -> Iterator[Callable[[], None]]:
    sweep_stale()
    slot_bytes = [layout_of(_message(size)).total_bytes for size in sizes]
    check_shared_memory(sum(2 * ring_bytes(slots, each) for each in slot_bytes))
    names = {f"{prefix}-{i}{way}": each for i, each in enumerate(slot_bytes) for way in ("there", "back")}

    def unlink() -> None:
        for name in names:
            unlink_ring(name)

    try:
        for name, each in names.items():
            create_ring(name, slots, each)
        yield unlink
    finally:
        unlink()


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


def _ping(prefix: str, sizes: tuple[int, ...], rounds: int, parent: Connection) -> None:
    """Report "attached", then by size and round (p50 us, p99 us, GB/s)."""
    torch.set_num_threads(1)
    there = [_sender(f"{prefix}-{i}there") for i in range(len(sizes))]
    back = [_receiver(f"{prefix}-{i}back") for i in range(len(sizes))]
    parent.send("attached")
    samples: list[list[tuple[float, float, float]]] = [[] for _ in sizes]
    for _ in range(rounds):
        for i, size in enumerate(sizes):
            message = _message(size)
            hops_us = [_round_trip_s(there[i], back[i], message) / 2 * 1e6 for _ in range(_NUM_PINGS)]
            hops_us = sorted(hops_us[_NUM_WARM_UP:])
            p50, p99 = (hops_us[int(share * len(hops_us))] for share in (0.50, 0.99))
            stream_s = _stream_s(there[i], back[i], message, _num_streamed(size))
            samples[i].append((p50, p99, size * _num_streamed(size) / stream_s / 1e9))
    parent.send(samples)


def _pong(prefix: str, sizes: tuple[int, ...], rounds: int, parent: Connection) -> None:
    """The mirror image of `_ping`: echo the pings, swallow the stream and confirm it."""
    torch.set_num_threads(1)
    there = [_receiver(f"{prefix}-{i}there") for i in range(len(sizes))]
    back = [_sender(f"{prefix}-{i}back") for i in range(len(sizes))]
    parent.send("attached")
    for _ in range(rounds):
        for i, size in enumerate(sizes):
            for _ in range(_NUM_PINGS):
                back[i].send(there[i].receive(_STEP_DEADLINE_S), _STEP_DEADLINE_S)
                there[i].release()
            for _ in range(_num_streamed(size)):
                there[i].receive(_STEP_DEADLINE_S)
                there[i].release()
            back[i].send(_message(4), _STEP_DEADLINE_S)


def _round_trip_s(there: Sender, back: Receiver, message: Message) -> float:
    start = time.perf_counter()
    there.send(message, _STEP_DEADLINE_S)
    back.receive(_STEP_DEADLINE_S)
    back.release()
    return time.perf_counter() - start


def _stream_s(there: Sender, back: Receiver, message: Message, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        there.send(message, _STEP_DEADLINE_S)
    back.receive(_STEP_DEADLINE_S)
    back.release()
    return time.perf_counter() - start


def _sender(name: str) -> Sender:
    return ShmSender.attach(name, label=name, deadline_s=_STEP_DEADLINE_S)


def _receiver(name: str) -> Receiver:
    return ShmReceiver.attach(name, label=name, deadline_s=_STEP_DEADLINE_S)


def _message(size: int) -> Message:
    return Message(Kind.ACTIVATION, batch=0, stage=0, tensors=(torch.zeros(size // 4),))


def _num_streamed(size: int) -> int:
    return max(32, min(2000, _STREAM_BYTES // size))


def _row(size: int, samples: Sequence[tuple[float, float, float]]) -> ChannelRow:
    p50, p99, rate = (
        Spread(median=statistics.median(figures), min=min(figures), max=max(figures))
        for figures in zip(*samples, strict=True)
    )
    return ChannelRow(
        channel="shared memory",
        message_bytes=size,
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
