"""The processes of a rival: start one per rank, wait for what they found, and end them all, whatever happens.

    parent  run_ranks -> starts the ranks -> waits, with a deadline -> kills and reaps them -> records, or one error
    rank    joins the gloo group through a file -> works -> sends its record, or how it failed

A rank that failed keeps its connections open until it is killed, so that the others do not fail in its wake.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection as mp_connection
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from launch.peers.record import RankRun
from workers.processes import process_context

__all__ = ["run_ranks"]

_AFTERMATH_S = 0.5  # a rank that was killed and a rank that noticed are told apart by waiting for both


class _Failed(msgspec.Struct, frozen=True, tag="failed"):
    message: str
    trace: str


@dataclass
class _Rank:
    """A rank as the parent sees it."""

    process: BaseProcess
    pipe: Connection
    said: RankRun | _Failed | None = None
    silent: bool = False  # it ended without a word


def run_ranks(peer: str, work: Callable[[int], RankRun], *, ranks: int, threads: int, within_s: float) -> list[RankRun]:
    """Run ``work(rank)`` in ``ranks`` fresh processes that form one gloo group.

    The group listens on the loopback interface; ``GLOO_SOCKET_IFNAME`` in the environment names another one.

    Args:
        peer: what it is called in an error.
        work: what a rank does once the group stands; travels to the processes.
        ranks: number of processes.
        threads: compute threads of each.
        within_s: how long everything may take.

    Returns:
        What the ranks found, by rank.

    Raises:
        RuntimeError: a rank failed or died, with its traceback; or it took too long.

    Blocks:
        until all are over, at most ``within_s``. No process is left, neither after an error.
    """
    crew: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="freewheel-peer-") as folder:
        try:
            for rank in range(ranks):
                crew.append(_start(work, rank, ranks, threads, within_s, Path(folder) / "rendezvous"))
            return _collect(peer, crew, within_s)
        finally:
            for one in crew:
                one.process.kill()
            for one in crew:
                one.process.join(5.0)
                one.pipe.close()


# ---------------------------------------------------------------- in the parent


def _start(work: Callable[[int], RankRun], rank: int, ranks: int, threads: int, within_s: float, store: Path) -> _Rank:
    context = process_context(__name__)
    mine, theirs = context.Pipe()
    arguments = (work, rank, ranks, threads, within_s, store, theirs)
    process = context.Process(target=_main, args=arguments, name=f"rank-{rank}", daemon=True)
    try:
        process.start()
    finally:
        theirs.close()
    return _Rank(process, mine)


def _collect(peer: str, crew: Sequence[_Rank], within_s: float) -> list[RankRun]:
    deadline = time.monotonic() + within_s
    while waiting := _waiting(crew):
        _listen(waiting, deadline - time.monotonic())
        if any(one.silent or isinstance(one.said, _Failed) for one in crew):
            _listen(_waiting(crew), _AFTERMATH_S)
            raise RuntimeError(_what_failed(peer, crew))
        if time.monotonic() >= deadline:
            missing = ", ".join(str(rank) for rank, one in enumerate(crew) if one.said is None)
            raise RuntimeError(f"{peer} did not end within {within_s:.0f} s: rank {missing} of {len(crew)} still ran")
    return [one.said for one in crew if isinstance(one.said, RankRun)]


def _waiting(crew: Sequence[_Rank]) -> list[_Rank]:
    return [one for one in crew if one.said is None and not one.silent]


def _listen(waiting: Sequence[_Rank], within_s: float) -> None:
    """Take in what the ranks say until one has spoken."""
    ready = mp_connection.wait([one.pipe for one in waiting], max(0.0, within_s))
    for one in waiting:
        if one.pipe in ready:
            try:
                one.said = msgspec.msgpack.decode(one.pipe.recv_bytes(), type=RankRun | _Failed)
            except (EOFError, ConnectionError):
                one.silent = True


def _what_failed(peer: str, crew: Sequence[_Rank]) -> str:
    """A rank that died comes first: the others only saw it go."""
    for rank, one in enumerate(crew):
        if one.silent:
            one.process.join(2.0)
            code = one.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"{peer}: rank {rank} of {len(crew)} {how}"
    rank, failed = next((rank, one.said) for rank, one in enumerate(crew) if isinstance(one.said, _Failed))
    return f"{peer}: rank {rank} of {len(crew)} failed: {failed.message}\n{failed.trace}"


# ---------------------------------------------------------------- in a rank


def _main(
    work: Callable[[int], RankRun],
    rank: int,
    ranks: int,
    threads: int,
    within_s: float,
    store: Path,
    connection: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    _end_with_the_parent(store.parent)
    torch.set_num_threads(threads)
    try:
        _join(rank, ranks, within_s, store)
        said: RankRun | _Failed = work(rank)
        dist.barrier()  # nobody leaves while another one still talks to it
    except BaseException as error:
        cause = _root(error)
        said = _Failed(f"{type(cause).__name__}: {cause}", traceback.format_exc())
    connection.send_bytes(msgspec.msgpack.encode(said))
    connection.poll(within_s)  # until the parent has heard all and kills us


def _join(rank: int, ranks: int, within_s: float, store: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    dist.init_process_group(
        "gloo",
        init_method=store.as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=within_s),
    )


def _root(error: BaseException) -> BaseException:
    """What happened first: torch wraps the model's errors into its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _loopback() -> str:
    """``lo`` on Linux, ``lo0`` elsewhere."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _end_with_the_parent(folder: Path) -> None:
    """A rank whose parent has died works for nobody, and tidies up after it."""
    parent = parent_process()
    assert parent is not None, "a rank has a parent"

    def watch() -> None:
        mp_connection.wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
