"""A rank's part in a benchmark over many ranks: do what the coordinator says, turn by turn, and nothing of its own.

    coordinator  --turn-->  participant  --->  agent -> worker         a training run of ours (`supervision.rank_agent`)
                                         --->  rank of a rival         a process of its own

Between two turns nothing of the last one is left: no process, no connection but the one to the coordinator.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import connection as mp_connection
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec

from launch.bench.rivals import RankProcess, Seat, Training
from launch.bench.rivals.record import Failed
from launch.options.options import Parsed
from launch.ranks.agreement import changed
from launch.ranks.bench_messages import Agree, Answer, Halt, Halted, RaceTurn, RankSaid, Seen, TrainTurn, turn_in
from pipeline import PlanError
from workers.clock import now_ns
from workers.processes.context import process_context
from workers.supervision import protocol
from workers.supervision.protocol import ControlSocket, Hello, Task, WorkerStatus
from workers.supervision.rank_agent import DriverGone, farewell, serve
from workers.supervision.rank_worker import start_fork_server
from workers.worker.assignment import Assignment

__all__ = ["PrepareTask", "take_part"]

_LOOK_EVERY_S = 0.2
_TURN_WITHIN_S = 900.0  # the coordinator may be measuring layers, or drawing
_ANSWER_WITHIN_S = 8.0

PrepareTask = Callable[[Parsed], Callable[[Task], Assignment]]
"""What is to be run -> what makes this rank's assignment of a task; the latter raises PlanError where they differ."""


def take_part(
    wire: ControlSocket,
    hello: Callable[[], Hello],
    parsed: Parsed | None,
    prepare: PrepareTask,
    call: Callable[[], ControlSocket],
    asked: Callable[[], bool],
    observe: Callable[[WorkerStatus], None] | None = None,
) -> int:
    """Take part in one benchmark.

    Args:
        wire: to the coordinator.
        hello: who this is, for every connection anew.
        parsed: recipe and plan as this process understands them; None: it did not, and the coordinator ends it all.
        prepare: see ``PrepareTask``.
        call: connects to the coordinator once more, for one training run.
        asked: whether somebody asked this process to end (SIGINT, SIGTERM).
        observe: see ``workers.supervision.rank_agent.serve``.

    Returns:
        the exit status that the coordinator gave.

    Raises:
        DriverGone: no more word from the coordinator.

    Blocks:
        until the coordinator ends the benchmark or is gone; 900 s for the next turn.
    """
    process_context("launch.bench.rivals.rank_process", "launch.bench.single_process", "torch.distributed.pipelining")
    start_fork_server()
    participant = _Participant(wire, hello, parsed, prepare, call, asked, observe)
    try:
        participant.live()
    except _Stop as stop:
        participant.halt()
        return farewell(wire, stop.status)
    except protocol.Gone as gone:
        raise DriverGone(str(gone), participant.begun) from gone
    finally:
        participant.halt()


class _Stop(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Participant:
    def __init__(
        self,
        wire: ControlSocket,
        hello: Callable[[], Hello],
        parsed: Parsed | None,
        prepare: PrepareTask,
        call: Callable[[], ControlSocket],
        asked: Callable[[], bool],
        observe: Callable[[WorkerStatus], None] | None,
    ) -> None:
        self.begun = False
        self._wire, self._hello, self._parsed, self._prepare = wire, hello, parsed, prepare
        self._call, self._asked, self._observe = call, asked, observe
        self._rank: RankProcess | None = None
        self._awaited = False  # the rank has not spoken yet
        self._interrupted_at: float | None = None

    def live(self) -> NoReturn:
        """Ends with an exception."""
        self._wire.send(self._hello())
        heard_at = time.monotonic()
        while True:
            watched = [self._wire, *([self._rank] if self._rank and self._awaited else [])]
            ready: Sequence[object] = mp_connection.wait(cast(Any, watched), _LOOK_EVERY_S)
            if self._rank in ready and self._rank is not None:
                self._awaited = False
                self._answer(RankSaid(self._rank.take()))
            while self._wire.poll():
                self._obey(self._wire.receive())
                heard_at = time.monotonic()
            if time.monotonic() - heard_at > _TURN_WITHIN_S:
                raise protocol.Gone(f"no word from it for {_TURN_WITHIN_S:.0f} s")
            self._pass_on_interrupt()

    def halt(self) -> None:
        """End the rank of a rival, if one is there; a second call does nothing."""
        if self._rank is not None:
            self._rank.kill()
            self._rank.reap()
        self._rank, self._awaited = None, False

    def _obey(self, record: protocol.Control) -> None:
        if isinstance(record, protocol.Stop):
            raise _Stop(record.status)
        if isinstance(record, protocol.ReadClock):
            self._wire.send(protocol.Time(now_ns()))
        if isinstance(record, protocol.Note):
            self.begun = True
            turn = turn_in(record.content)
            if isinstance(turn, Agree):
                self._answer(Seen(self._differences(turn)))
            elif isinstance(turn, TrainTurn):
                self._train(turn)
            elif isinstance(turn, RaceTurn):
                self._race(turn)
            elif isinstance(turn, Halt):
                self.halt()
                self._answer(Halted())

    def _differences(self, turn: Agree) -> list[str]:
        try:
            self._prepare(self._told(turn.changes))(turn.task)
        except PlanError as error:
            return list(error.problems)
        return []

    def _train(self, turn: TrainTurn) -> None:
        with contextlib.closing(self._call()) as wire:
            prepare = self._prepare(self._told(turn.changes))
            serve(wire, self._hello(), prepare, self._asked, self._observe, last=False)

    def _race(self, turn: RaceTurn) -> None:
        told = self._told(turn.changes)
        weights = Path(turn.weights) if turn.weights is not None else None
        seat = Seat(self._hello().rank, turn.ranks, turn.threads, turn.within_s, turn.meeting)
        try:
            training = Training(told.source, told.plan, turn.warmup, turn.evaluates, weights)
            self._rank, self._awaited = RankProcess(turn.rival, training, seat), True
        except (OSError, RuntimeError) as error:
            self._answer(RankSaid(Failed(f"its process could not be started: {error}", "")))

    def _told(self, changes: dict[str, Any]) -> Parsed:
        assert self._parsed is not None, "the coordinator ends a benchmark whose ranks have problems"
        return replace(self._parsed, plan=changed(self._parsed.plan, changes))

    def _answer(self, answer: Answer) -> None:
        self._wire.send(protocol.Note(msgspec.msgpack.encode(answer)))

    def _pass_on_interrupt(self) -> None:
        """The coordinator ends it all; if it cannot, this rank ends by itself."""
        if not self._asked():
            return
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic()
            self._wire.send(protocol.Interrupted())
        elif time.monotonic() - self._interrupted_at > _ANSWER_WITHIN_S:
            raise protocol.Gone(f"no answer to an interrupt within {_ANSWER_WITHIN_S:.0f} s")
