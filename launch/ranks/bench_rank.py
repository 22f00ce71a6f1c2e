"""A rank's part in a benchmark over many ranks: do what the coordinator says, turn by turn, and nothing of its own.

    coordinator  --turn-->  participant  --->  agent -> worker         a training run of ours (`supervision.rank_agent`)
                                         --->  rank of a rival         a process of its own

Between two turns nothing of the last one is left: no process, no connection but the one to the coordinator.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from multiprocessing import connection as mp_connection
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec

from launch.bench.rivals import RankProcess, Seat, Training
from launch.bench.rivals.record import Failed
from launch.options.options import Parsed
from launch.ranks.agreement import changed
from launch.ranks.bench_messages import Agree, Answer, Halted, RaceTurn, RankSaid, Seen, TrainTurn, Turn
from launch.ranks.part import RankPart
from pipeline import PlanError
from workers.processes.context import listener, process_context
from workers.supervision.control_records import Note
from workers.supervision.control_socket import ControlSocket
from workers.supervision.driver_connection import DriverConnection

__all__ = ["take_part"]

_TURN_WITHIN_S = 900.0  # the coordinator may be measuring layers, or drawing


def take_part(part: RankPart, wire: ControlSocket) -> int:
    """Take part in one benchmark; gives the exit status that the coordinator gave.

    Blocks until that ends it; raises DriverGone where it is gone, or gives no next turn for 900 s.
    """
    process_context("launch.bench.rivals.rank_process", "launch.bench.single_process", "torch.distributed.pipelining")
    listener()  # the fork server imports while this process waits
    driver = DriverConnection(wire, part.asked)
    participant = _Participant(part, driver)
    return driver.take_part(participant.live, participant.halt)


class _Participant:
    def __init__(self, part: RankPart, driver: DriverConnection) -> None:
        self._part, self._driver = part, driver
        self._rank: RankProcess | None = None
        self._awaited = False  # the rank has not spoken yet

    def live(self) -> NoReturn:
        """Ends with an exception."""
        self._driver.send(self._part.hello())
        while True:
            watched = [self._rank] if self._rank and self._awaited else []
            told = self._driver.hear(_TURN_WITHIN_S, *watched)
            for rank in mp_connection.wait(cast(Any, watched), 0.0):
                self._awaited = False
                self._answer(RankSaid(cast(RankProcess, rank).take()))
            for record in told:
                if isinstance(record, Note):
                    self._driver.begun = True
                    self._obey(msgspec.msgpack.decode(record.content, type=Turn))

    def halt(self) -> None:
        """End the rank of a rival, if one is there; a second call does nothing."""
        if self._rank is not None:
            self._rank.kill()
            self._rank.reap()
        self._rank, self._awaited = None, False

    def _obey(self, turn: Turn) -> None:
        if isinstance(turn, Agree):
            self._answer(Seen(self._differences(turn)))
        elif isinstance(turn, TrainTurn):
            part = replace(self._part, parsed=self._told(turn.changes))
            with contextlib.closing(part.call()) as wire:
                part.train(wire, last=False)
        elif isinstance(turn, RaceTurn):
            self._race(turn)
        else:
            self.halt()
            self._answer(Halted())

    def _differences(self, turn: Agree) -> list[str]:
        try:
            self._part.prepare(self._told(turn.changes), turn.task)
        except PlanError as error:
            return list(error.problems)
        return []

    def _race(self, turn: RaceTurn) -> None:
        told = self._told(turn.changes)
        weights = Path(turn.weights) if turn.weights is not None else None
        seat = Seat(self._part.hello().rank, turn.ranks, turn.threads, turn.within_s, turn.meeting)
        try:
            training = Training(told.source, told.plan, turn.warmup, turn.evaluates, weights)
            self._rank, self._awaited = RankProcess(turn.rival, training, seat), True
        except (OSError, RuntimeError) as error:
            self._answer(RankSaid(Failed(f"its process could not be started: {error}", "")))

    def _told(self, changes: dict[str, Any]) -> Parsed:
        parsed = self._part.parsed
        assert parsed is not None, "the coordinator ends a benchmark whose ranks have problems"
        return replace(parsed, plan=changed(parsed.plan, changes))

    def _answer(self, answer: Answer) -> None:
        self._driver.send(Note(msgspec.msgpack.encode(answer)))
