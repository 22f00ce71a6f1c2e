"""What the driver of a run on many ranks and the ranks' agents tell each other, as records.

driver  ----  Task, Start, Go, Enough, Dump, Stop  ------------------------->  agent     one connection per rank
        <---  Hello, Prepared, WorkerStatus, File, what the worker says  ----
"""

from __future__ import annotations

import msgspec

from workers.telemetry import records

__all__ = [
    "AgentStopped",
    "Control",
    "Dump",
    "Enough",
    "File",
    "Hello",
    "Interrupted",
    "Note",
    "Prepared",
    "RankGone",
    "ReadClock",
    "Start",
    "Stop",
    "Task",
    "Time",
    "WorkerDied",
    "WorkerStatus",
]


class Hello(msgspec.Struct, tag=True, frozen=True):
    """An agent introduces itself."""

    rank: int  # the number of its worker
    pid: int
    host: str
    memory: str  # names the shared memory that it sees; agents that give the same one can share
    prefix: str  # a start for names in that memory that belong to this process
    problems: list[str] = []  # why it cannot take part, one sentence each
    gpus: int = 0  # how many its host has, where the driver shares them out
    device: str = ""  # where its worker computes, if whoever started the agent has said so; else the driver says
    nccl: bool = False  # whether its torch has NCCL


class ReadClock(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: what does your clock say? Also the sign that the driver lives."""


class Time(msgspec.Struct, tag=True, frozen=True):
    """The answer: nanoseconds of the host's own common clock."""

    time_ns: int


class Task(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: what is to be run."""

    sizes: list[int]  # layers per stage, as resolved by the driver
    hosts: list[str]  # of every worker
    prefix: str  # of the names in the shared memory of the agent's host
    makes_memory: bool  # whether this agent makes and removes what lies there
    meeting: tuple[str, int] | None  # (host, port) where workers without common memory meet; None: there are none
    profile: dict[str, str]  # what recipe and plan look like to the driver, one text per property
    devices: list[str] = []  # where every worker computes; empty: as the agent finds, whose plan it is


class Prepared(msgspec.Struct, tag=True, frozen=True):
    """The agent has looked at its task, and made the memory if that is its part."""

    problems: list[str] = []


class Start(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: everybody is prepared, start the worker, which writes into ``run_dir``.

    None: into unnamed files on its own host, and the driver gets them by wire.
    """

    run_dir: str | None


class WorkerStatus(msgspec.Struct, tag=True, frozen=True):
    """What the worker does now (``status_table.Status``). ``state`` is the process's letter in /proc, or empty."""

    span: int
    batch: int
    start_ns: int
    progress: int
    state: str


class WorkerDied(msgspec.Struct, tag=True, frozen=True):
    """The worker ended without a word; ``why``: it is the fork server that ended, and how."""

    pid: int
    exit_code: int
    why: str = ""


class RankGone(msgspec.Struct, tag=True, frozen=True):
    """What the driver notes once nothing comes from an agent any more. Is never sent."""

    why: str


class File(msgspec.Struct, tag=True, frozen=True):
    """A piece of a file that the worker wrote, by its name in ``assignment.FILES``; ``last`` is its last piece."""

    what: str
    data: bytes
    last: bool


class Note(msgspec.Struct, tag=True, frozen=True):
    """Either way: a record of those who use a wire for more than one run, as MessagePack."""

    content: bytes


class Enough(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: take no further training batch, finish what is in the pipeline."""


class Dump(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: send the stacks of the worker's threads."""


class Interrupted(msgspec.Struct, tag=True, frozen=True):
    """Somebody sent the agent SIGINT or SIGTERM."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: end the worker; then exit with ``status``, once the driver has hung up."""

    status: int


class AgentStopped(msgspec.Struct, tag=True, frozen=True):
    """The agent's worker has ended, and its memory is removed."""


_FromDriver = ReadClock | Task | Start | Note | Enough | Dump | Stop
_FromAgent = Hello | Time | Prepared | WorkerStatus | WorkerDied | File | Note | Interrupted | AgentStopped
Control = _FromDriver | _FromAgent | RankGone | records.Record
