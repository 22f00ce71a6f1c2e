"""What the ranks of a benchmark are told, turn by turn, and what they answer: notes on the wire to the coordinator.

    coordinator  --  Agree, TrainTurn, RaceTurn, Halt  -->  participants    one wire each, for the whole benchmark
                 <--  Seen, RankSaid, Halted  --

A plan travels as its ``changes`` from the one that all ranks have read from the same command.
"""

from __future__ import annotations

from typing import Any

import msgspec

from launch.bench.rivals import DDP, Said, TorchSchedule
from workers.channels.net.gloo import Rendezvous
from workers.supervision.control_records import Task

__all__ = ["Agree", "Answer", "Halt", "Halted", "RaceTurn", "RankSaid", "Seen", "TrainTurn", "Turn"]


class Agree(msgspec.Struct, tag=True, frozen=True):
    """Look whether recipe and plan are here what they are at the coordinator's, who has made ``task`` of them for
    comparison only. Answer: `Seen`.
    """

    task: Task
    changes: dict[str, Any]


class TrainTurn(msgspec.Struct, tag=True, frozen=True):
    """Take part in one training run of ours: call the coordinator again, as an agent. No answer on this wire."""

    changes: dict[str, Any]


class RaceTurn(msgspec.Struct, tag=True, frozen=True):
    """Run one rank of a rival. Answer: `RankSaid`, once. The fields are those of ``launch.bench.rivals``' Training
    (``weights``: a file on the host of rank 0) and Seat.
    """

    rival: DDP | TorchSchedule
    changes: dict[str, Any]
    warmup: int
    evaluates: bool
    weights: str | None
    ranks: int
    threads: int
    within_s: float
    meeting: Rendezvous


class Halt(msgspec.Struct, tag=True, frozen=True):
    """End the rank of the rival, whatever it does. Answer: `Halted`, once it has ended."""


class Seen(msgspec.Struct, tag=True, frozen=True):
    """What differs here, one sentence each."""

    problems: list[str]


class RankSaid(msgspec.Struct, tag=True, frozen=True):
    """The last word of a rank."""

    said: Said


class Halted(msgspec.Struct, tag=True, frozen=True):
    """No rank of a rival runs here."""


Turn = Agree | TrainTurn | RaceTurn | Halt
Answer = Seen | RankSaid | Halted
