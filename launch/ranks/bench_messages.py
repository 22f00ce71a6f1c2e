"""What the ranks of a benchmark are told, turn by turn, and what they answer: notes on the wire to the coordinator.

    coordinator  --  Agree, Train, Race, Halt  -->  participants        one wire each, for the whole benchmark
                 <--  Seen, RankSaid, Halted  --

Records are plain data. A plan travels as its differences from the one that all ranks have read from the same command.
"""

from __future__ import annotations

from typing import Any

import msgspec

from launch.bench.rivals import DDP, Said, TorchSchedule
from workers.channels.net.gloo import Rendezvous
from workers.supervision.control_records import Task

__all__ = [
    "Agree",
    "Answer",
    "Halt",
    "Halted",
    "RaceTurn",
    "RankSaid",
    "Seen",
    "TrainTurn",
    "Turn",
    "answer_in",
    "turn_in",
]


class Agree(msgspec.Struct, tag=True, frozen=True):
    """Look whether recipe and plan are here what they are at the coordinator's. Answer: `Seen`.

    Attributes:
        task: what the coordinator sees; nothing is made of it.
        changes: of the plan.
    """

    task: Task
    changes: dict[str, Any]


class TrainTurn(msgspec.Struct, tag=True, frozen=True):
    """Take part in one training run of ours: call the coordinator again, as an agent. No answer on this wire.

    Attributes:
        changes: of the plan.
    """

    changes: dict[str, Any]


class RaceTurn(msgspec.Struct, tag=True, frozen=True):
    """Run one rank of a rival. Answer: `RankSaid`, once.

    Attributes:
        rival: what it does.
        changes: of the plan.
        warmup: first batches that are not timed.
        evaluates: whether to look at the held-out batches at the end.
        weights: file for the final weights, on the host of rank 0; None: nowhere.
        ranks: number of ranks.
        threads: compute threads.
        within_s: how long it may take, in seconds.
        meeting: where the ranks find each other.
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

_turns: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Turn)
_answers: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Answer)


def turn_in(content: bytes) -> Turn:
    """Decode what the coordinator says.

    Raises:
        msgspec.DecodeError: it is no turn.
    """
    turn: Turn = _turns.decode(content)
    return turn


def answer_in(content: bytes) -> Answer:
    """Decode what a participant says; as `turn_in`."""
    answer: Answer = _answers.decode(content)
    return answer
