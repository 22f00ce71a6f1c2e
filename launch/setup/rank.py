"""This process as one rank of many that torchrun started, and how the ranks find each other.

torchrun gives every rank a number and the address of a TCPStore. Rank 0 writes there its host and port, and the run's
key; from then on the ranks talk to rank 0 directly (``workers.supervision.control_socket``).
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import msgspec
import torch.distributed as dist

from launch.setup.local_gpus import gpus_here
from launch.setup.network import address_of
from pipeline import PlanError
from workers.channels.gpu.nccl import nccl_here
from workers.channels.net.gloo import INTERFACE, address_towards
from workers.channels.shm.ring import new_prefix
from workers.supervision.control_records import Hello
from workers.supervision.control_socket import ControlSocket, Reception, connect_to

__all__ = ["MEET_WITHIN_S", "Rank", "held_back_signals", "memory"]

MEET_WITHIN_S = 120.0
"""How long ranks wait for each other at the start."""
_LOOK_EVERY_S = 0.05
_LEAVE_WITHIN_S = 30.0
_CONNECT_WITHIN_S = 5.0


def held_back_signals() -> Callable[[], bool]:
    """Hold SIGINT and SIGTERM back from now on, for good; what is returned says whether one of them came.

    A rank gets several of them: Ctrl-C, and what torchrun sends when that, or another rank's end, reaches it.
    """
    came: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: came.append(number))
    return lambda: bool(came)


@dataclass(frozen=True)
class Rank:
    """Rank ``index`` of ``world``, on ``nodes`` hosts. ``prefix`` of its keys in the store is new after a restart."""

    index: int
    world: int
    nodes: int
    store_host: str
    store_port: int
    prefix: str

    @classmethod
    def current(cls) -> Self | None:
        """This process's rank; None: torchrun did not start it."""
        given = os.environ
        if "TORCHELASTIC_RUN_ID" not in given or "RANK" not in given:
            return None
        counts = int(given["RANK"]), int(given["WORLD_SIZE"]), int(given.get("GROUP_WORLD_SIZE", "1"))
        prefix = f"freewheel/{given.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return cls(*counts, given["MASTER_ADDR"], int(given["MASTER_PORT"]), prefix)

    def program(self) -> list[str]:
        """How the command is started again with as many ranks."""
        nodes = ["--nnodes", str(self.nodes)] if self.nodes > 1 else []
        return ["torchrun", *nodes, "--nproc-per-node", str(self.world // self.nodes), "-m", "freewheel"]

    def hello(self, problems: list[str] | None = None) -> Hello:
        """How this rank introduces itself to the driver."""
        where = socket.gethostname(), memory(), new_prefix()
        return Hello(self.index, os.getpid(), *where, problems or [], gpus_here(), nccl=nccl_here())

    def reception(self) -> Reception:
        """Rank 0: take calls from now on, and tell the others where; PlanError where other hosts cannot reach this one.

        Blocks with several hosts, until a rank of another one has come to the store, at most 120 s.
        """
        store = self._store()
        reception = Reception(self._reachable_address(store))
        where = reception.host, reception.port, reception.key
        store.set(f"{self.prefix}/driver", msgspec.json.encode(where).decode())
        return reception

    def call(self, asked: Callable[[], bool]) -> ControlSocket:
        """Every other rank: connect to rank 0. Blocks until it answers, at most 120 s.

        TimeoutError: there was no connection by then; KeyboardInterrupt: this process was asked to end.
        """
        store, seen = self._store(), "it has not said where it is"
        store.set(f"{self.prefix}/address/{self.index}", address_towards(self.store_host, self.store_port))
        end = time.monotonic() + MEET_WITHIN_S
        while time.monotonic() < end:
            if asked():
                raise KeyboardInterrupt
            if store.check([f"{self.prefix}/driver"]):
                host, port, key = msgspec.json.decode(store.get(f"{self.prefix}/driver"), type=tuple[str, int, bytes])
                try:
                    return connect_to(host, port, key, _CONNECT_WITHIN_S)
                except OSError as error:  # it may have ended: torchrun then ends us; or been started anew
                    seen = f"{host}:{port}: {error}"
            time.sleep(_LOOK_EVERY_S)
        raise TimeoutError(
            f"rank {self.index} on {socket.gethostname()} could not reach rank 0 within {MEET_WITHIN_S:.0f} s "
            f"({seen}): let the hosts connect to each other on all ports, or choose their network with {INTERFACE}"
        )

    def leave_the_word(self) -> None:
        """Wait, at most 30 s, until torchrun ends this rank: rank 0 has to be the first to end with the same error."""
        numbers = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        signal.sigtimedwait(numbers, _LEAVE_WITHIN_S)

    def _store(self) -> Any:
        """The store that torchrun hosts, or that rank 0 has to host."""
        return next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=MEET_WITHIN_S))))[0]  # type: ignore[attr-defined]

    def _reachable_address(self, store: Any) -> str:
        """This host's address as the other ranks reach it."""
        if self.nodes == 1:
            return "127.0.0.1"
        if interface := os.environ.get(INTERFACE, "").partition(",")[0]:
            return address_of(interface)
        elsewhere = f"{self.prefix}/address/{self.world - 1}"  # ranks are numbered host by host
        end = time.monotonic() + MEET_WITHIN_S
        while not store.check([elsewhere]):
            if time.monotonic() > end:
                raise PlanError(
                    f"rank {self.world - 1} of {self.world} did not come within {MEET_WITHIN_S:.0f} s: look at what "
                    "torchrun printed on its host."
                )
            time.sleep(_LOOK_EVERY_S)
        theirs = store.get(elsewhere).decode()
        mine = address_towards(theirs, self.store_port)
        if ipaddress.ip_address(mine).is_loopback:
            raise PlanError(
                f"the way from rank 0 to rank {self.world - 1} at {theirs} does not leave {socket.gethostname()}: name "
                f"the network's interface on every host with {INTERFACE}, and its address with torchrun's --local-addr."
            )
        return mine


def memory() -> str:
    """Differs between processes that cannot share memory: other hosts, other containers."""
    boot, shm = Path("/proc/sys/kernel/random/boot_id"), Path("/dev/shm")
    started = boot.read_text().strip() if boot.exists() else ""
    return "/".join([socket.gethostname(), started, str(shm.stat().st_dev) if shm.is_dir() else ""])
