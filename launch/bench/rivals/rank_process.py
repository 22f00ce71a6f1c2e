"""The process of one rank of a rival, as whoever starts it sees it, and what it does.

    starter  RankProcess(...) -> waits on it -> take() -> kill(), reap()
    rank     joins the gloo group at a store -> works -> sends its record, or how it failed

A rank that failed keeps its connections open until it is killed, so that the others do not fail in its wake.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import msgspec
import torch
import torch.distributed as dist

from launch.bench.rivals.loop import Rival, Training
from launch.bench.rivals.record import Failed, RankRun, RivalDied, Said
from launch.setup.network import interface_towards
from pipeline.wording import said, traceback_of
from workers.channels.net.gloo import INTERFACE, Rendezvous
from workers.processes.context import process_context
from workers.processes.end_with_parent import end_with_the_parent

__all__ = ["RankProcess", "Seat"]

_REAP_WITHIN_S = 5.0
_EXIT_WITHIN_S = 2.0


@dataclass(frozen=True)
class Seat:
    """One rank's place among the ranks of a run.

    Attributes:
        rank: its number.
        ranks: how many there are.
        threads: its compute threads.
        within_s: how long the run may take, in seconds; no message may take longer.
        meeting: where the ranks find each other.
    """

    rank: int
    ranks: int
    threads: int
    within_s: float
    meeting: Rendezvous


class RankProcess:
    """One rank in a process of its own, which this starts.

    The group listens at this host's address on the way to the meeting; ``GLOO_SOCKET_IFNAME`` in the environment names
    another interface.

    Args:
        rival: what it does.
        training: on what.
        seat: where.
    """

    def __init__(self, rival: Rival, training: Training, seat: Seat) -> None:
        context = process_context(__name__)
        self._pipe, theirs = context.Pipe()
        arguments = (rival, training, seat, theirs)
        self._process = context.Process(target=_main, args=arguments, name=f"rank-{seat.rank}", daemon=True)
        try:
            self._process.start()
        finally:
            theirs.close()

    def fileno(self) -> int:
        """For ``multiprocessing.connection.wait``: ready when it has said its last word, or died."""
        return self._pipe.fileno()

    def take(self) -> Said:
        """Its last word; once.

        Blocks:
            until it comes, and 2 s for the exit code of a process that died.
        """
        try:
            said: Said = msgspec.msgpack.decode(self._pipe.recv_bytes(), type=Said)
            return said
        except (EOFError, ConnectionError):
            self._process.join(_EXIT_WITHIN_S)
            code = self._process.exitcode or 0
            return RivalDied(
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )

    def kill(self) -> None:
        """End it. Does not block; `reap` afterwards."""
        self._process.kill()

    def reap(self) -> None:
        """Wait until it has ended; at most 5 s."""
        self._process.join(_REAP_WITHIN_S)
        self._pipe.close()


def _main(rival: Rival, training: Training, seat: Seat, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's, who ends us
    end_with_the_parent()
    torch.set_num_threads(seat.threads)
    try:
        _join(seat)
        found: RankRun | Failed = rival(training, seat.rank)
        dist.barrier()  # nobody leaves while another one still talks to it
    except BaseException as error:
        cause = _root(error)
        found = Failed(said(cause), traceback_of(error))
    connection.send_bytes(msgspec.msgpack.encode(found))
    connection.poll(seat.within_s)  # until everybody has been heard, and we are killed


def _join(seat: Seat) -> None:
    where, timeout = seat.meeting, timedelta(seconds=seat.within_s)
    os.environ.setdefault(INTERFACE, interface_towards(where.host, where.port))
    store = dist.TCPStore(where.host, where.port, is_master=False, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=seat.rank, world_size=seat.ranks, timeout=timeout)


def _root(error: BaseException) -> BaseException:
    """What happened first: torch wraps the model's errors into its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
