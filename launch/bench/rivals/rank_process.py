"""The process of one rank of a rival: it joins the gloo group at a store, works, and sends its record or how it failed.

A rank that failed keeps its connections open until it is killed, so that the others do not fail in its wake.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import cast

import torch
import torch.distributed as dist

from launch.bench.rivals.child import Child, ChildDied
from launch.bench.rivals.loop import Rival, Training
from launch.bench.rivals.record import Failed, Said
from launch.setup.network import interface_towards
from pipeline.wording import said, traceback_of
from workers.channels.net.gloo import INTERFACE, Rendezvous

__all__ = ["RankProcess", "Seat"]


@dataclass(frozen=True)
class Seat:
    """One rank's place among the ranks of a run, which find each other at the meeting; a message may take within_s."""

    rank: int
    ranks: int
    threads: int
    within_s: float
    meeting: Rendezvous


class RankProcess(Child):
    """One rank in a process of its own, at this host's address on the way to the meeting.

    ``GLOO_SOCKET_IFNAME`` in the environment names another interface.
    """

    def __init__(self, rival: Rival, training: Training, seat: Seat) -> None:
        super().__init__(f"rank-{seat.rank}", _work, rival, training, seat)

    def take(self) -> Said:
        """Its last word; once. Blocks as `Child.take`."""
        try:
            return cast(Said, super().take())
        except ChildDied as died:
            return Failed(str(died), "", died=True)


def _work(pipe: Connection, rival: Rival, training: Training, seat: Seat) -> None:
    torch.set_num_threads(seat.threads)
    where, timeout = seat.meeting, timedelta(seconds=seat.within_s)
    try:
        os.environ.setdefault(INTERFACE, interface_towards(where.host, where.port))
        store = dist.TCPStore(where.host, where.port, is_master=False, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=seat.rank, world_size=seat.ranks, timeout=timeout)
        found: Said = rival(training, seat.rank)
        dist.barrier()  # nobody leaves while another one still talks to it
    except BaseException as error:
        trace = traceback_of(error)
        while error.__cause__ is not None:  # torch wraps the model's errors into its own: what happened first is said
            error = error.__cause__
        found = Failed(said(error), trace)
    pipe.send(found)
