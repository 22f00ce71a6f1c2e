"""What runs inside the Ray actor of one stage: the same agent as in a rank of torchrun, and its worker as a child.

    driver  <--wire-->  actor: agent  <--pipe-->  worker process

Ray carries one argument to the actor, bytes with a `Call` in MessagePack, and status words back. What is trained
travels on the run's own channels, what is said on the run's own wire.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import torch

from launch.on_ray.gpus import assigned_device
from launch.options.options import RunOptions, parse
from launch.options.ray_options import BenchRunOptions, TrainOptions
from launch.ranks.agreement import prepare_task
from launch.ranks.bench_rank import take_part
from launch.ranks.part import RankPart, TakesPart, understood
from launch.setup.local_gpus import gpus_here
from launch.setup.rank import memory
from pipeline.metrics.spans import Span
from pipeline.plan.replica_layout import called as called_in
from workers.channels.gpu.nccl import nccl_here
from workers.channels.shm.ring import new_prefix
from workers.processes.context import end_fork_server
from workers.supervision.control_records import Hello, WorkerStatus
from workers.supervision.control_socket import connect_to
from workers.supervision.driver_connection import DriverGone

__all__ = ["Call", "StageAgent"]

# What tells numerical libraries how many threads to use; Ray sets the first one to an actor's CPUs.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_CONNECT_WITHIN_S = 20.0
_COMMANDS: dict[str, tuple[type[RunOptions], TakesPart]] = {
    "train": (TrainOptions, RankPart.train),
    "bench": (BenchRunOptions, take_part),
}


class Call(msgspec.Struct, frozen=True):
    """What an actor is told: plain data, no code.

    ``driver`` is the host, port and key of its `Reception`, ``folder`` its working folder, to which paths are relative
    where it exists. ``gpus``: of each stage; 0: the worker computes on the CPU.
    """

    stage: int
    driver: tuple[str, int, bytes]
    command: str
    recipe: str
    arguments: list[str]
    folder: str
    threads: int
    gpus: float


class StageAgent:
    """The agent of one stage in a process that Ray started on ``node``, as messages call it; ``gpus`` are the ids of
    those that Ray has assigned to this process. Only stages on the node of one ``node_id`` share memory.
    """

    def __init__(self, node: str, node_id: str, gpus: Sequence[str]) -> None:
        self._node, self._node_id, self._gpus = node, node_id, gpus
        self._stage = -1
        self._stop = threading.Event()
        self._last: WorkerStatus | None = None

    def run(self, call: bytes) -> int:
        """Take part in one run or benchmark, as a `Call` in MessagePack says, until the driver stops it or is gone.

        Returns the exit status that the driver gave, 1 where it is gone; OSError: it cannot be reached from this node.
        """
        told = msgspec.msgpack.decode(call, type=Call)
        self._stage = told.stage
        for name in _THREAD_VARIABLES:
            os.environ[name] = str(told.threads)
        with contextlib.suppress(OSError):
            os.chdir(told.folder)
        options, takes_part = _COMMANDS[told.command]
        prog = f"freewheel {told.command}"
        parsed, problems = understood(partial(parse, told.recipe, told.arguments, options, prog, writes=False))
        device = ""
        if told.gpus and parsed is not None:
            who = called_in(parsed.plan, *divmod(told.stage, parsed.plan.stages))
            visible, built = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.backends.cuda.is_built()
            device, missing = assigned_device(who, self._gpus, visible, gpus_here(), built)
            problems += [missing] if missing else []

        def hello() -> Hello:
            place = self._node, f"{self._node_id}/{memory()}", new_prefix()
            return Hello(told.stage, os.getpid(), *place, problems, device=device, nccl=nccl_here())

        connect = partial(connect_to, *told.driver, _CONNECT_WITHIN_S)
        prepare, asked = partial(prepare_task, told.stage), self._stop.is_set
        with contextlib.closing(connect()) as wire:
            try:
                return takes_part(RankPart(hello, parsed, prepare, connect, asked, self._note), wire)
            except DriverGone as gone:
                print(f"freewheel: stage {told.stage} on {self._node}: {gone}", file=sys.stderr)
                return 1
            finally:
                end_fork_server()  # Ray kills actors, and Python then leaves its folder behind

    def status(self) -> Mapping[str, Any]:
        """What the stage does now; answers while `run` is busy.

        Stage, node, pid of this process; of its worker: span (what it does, None before the start), batch (or -1),
        progress (how often it turned to work) and state (its process's letter in /proc).
        """
        status = {"stage": self._stage, "node": self._node_id, "pid": os.getpid()}
        if (last := self._last) is None:
            return {**status, "span": None, "batch": -1, "progress": 0, "state": ""}
        span = Span(last.span).name.lower()
        return {**status, "span": span, "batch": last.batch, "progress": last.progress, "state": last.state}

    def stop(self) -> None:
        """End the whole run, as Ctrl-C at the driver does. Does not wait for it."""
        self._stop.set()

    def _note(self, status: WorkerStatus) -> None:
        self._last = status
