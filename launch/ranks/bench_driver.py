"""The driver of a benchmark over ranks that others have started: it says what runs next, and all follow.

coordinator  -- turns -->  participants             a standing fleet: signs of life, notes, the end
    |  one training of ours: a fleet of its own, with fresh connections (workers.supervision.remote_workers)
    |  one run of a rival:   a fresh store at which its ranks form their group (launch.bench.rivals)
    |  one process:          here
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from launch.bench.rivals import DDP, Hear, Rival, Said, TorchSchedule, Training
from launch.bench.where_rows_run import Site
from launch.options.options import Parsed
from launch.ranks.agreement import OwnPart, changes, profile
from launch.ranks.bench_messages import Agree, Answer, Halt, Halted, RaceTurn, RankSaid, Seen, TrainTurn, Turn
from launch.training import Launcher, Working
from pipeline import Plan, PlanError, Recipe
from pipeline.run.resolved import Resolved
from workers.channels.net.gloo import Rendezvous
from workers.errors import RunFailed
from workers.supervision.control_records import Task
from workers.supervision.remote_workers import RemoteWorkers

__all__ = ["Coordinator"]

_AGREED_WITHIN_S = 300.0
_HALTED_WITHIN_S = 20.0


class Coordinator:
    """Runs the rows of a benchmark over the participants of a gathered fleet; ``own``: the one in this process."""

    def __init__(self, parsed: Parsed, fleet: RemoteWorkers, own: OwnPart | None = None) -> None:
        self._parsed, self._fleet, self._own = parsed, fleet, own or OwnPart()
        self._hosts = fleet.hosts

    def site(self, name: str, resolve: Callable[[Callable[[], Recipe], Plan], Resolved]) -> Site:
        """Where the rows run, with the launcher's name."""
        ours, hosts = Launcher(name, self._working), tuple(self._hosts)
        return Site(launcher=ours, places=self, resolve=resolve, agree=self._agree, look=self._look, hosts=hosts)

    def host(self, rank: int) -> str:
        """See ``launch.bench.rivals.Places``."""
        return self._hosts[rank]

    @contextlib.contextmanager
    def started(self, rival: Rival, training: Training, *, ranks: int, threads: int, within_s: float) -> Iterator[Hear]:
        """See ``launch.bench.rivals.Places``. Of more participants (replicas) the first ones run the ranks."""
        assert ranks <= len(self._hosts), "a rank of a rival per participant at most"
        assert isinstance(rival, DDP | TorchSchedule), "what a rank does travels as plain data"
        weights = str(training.weights.resolve()) if training.weights is not None else None
        difference = changes(self._parsed.plan, training.plan)
        how = (training.warmup, training.evaluates, weights, ranks, threads, within_s)
        with Rendezvous.hosted(self._fleet.address) as meeting:
            self._tell(RaceTurn(rival, difference, *how, meeting), ranks)
            try:
                yield self._hear
            except BaseException:
                with contextlib.suppress(RunFailed, KeyboardInterrupt):  # the first error is the one to tell
                    self._halt(ranks)
                raise
            self._halt(ranks)

    def _hear(self, within_s: float) -> Mapping[int, Said]:
        return {rank: answer.said for rank, answer in self._answers() if isinstance(answer, RankSaid)}

    def _halt(self, ranks: int) -> None:
        self._tell(Halt(), ranks)
        self._await(Halted, _HALTED_WITHIN_S, ranks)

    def _agree(self, resolved: Resolved) -> None:
        """Raises PlanError where a participant sees another recipe or plan."""
        self._own.resolved = resolved
        task = Task(list(resolved.sizes), self._hosts, "", False, None, profile(resolved), list(resolved.devices))
        everybody = len(self._hosts)
        self._tell(Agree(task, changes(self._parsed.plan, resolved.plan)), everybody)
        seen = self._await(Seen, _AGREED_WITHIN_S, everybody)
        problems = [
            f"rank {rank} on {self._hosts[rank]}: {text}"
            for rank, answer in sorted(seen.items())
            for text in (answer.problems if isinstance(answer, Seen) else ())
        ]
        if problems:
            raise PlanError(*problems)

    def _look(self) -> None:
        self._answers()

    @contextlib.contextmanager
    def _working(self, source: Callable[[], Recipe], resolved: Resolved, run_dir: Path) -> Iterator[Working]:
        """One training run of ours; see ``launch.training.Launcher``."""
        self._own.resolved = resolved
        self._tell(TrainTurn(changes(self._parsed.plan, resolved.plan)), len(self._hosts))
        with self._fleet.anew() as fleet, fleet.prepared(resolved, profile(resolved)):
            yield fleet.run(run_dir), fleet.end_early

    def _tell(self, turn: Turn, ranks: int) -> None:
        """Tell the first so many participants."""
        content = msgspec.msgpack.encode(turn)
        for rank in range(ranks):
            self._fleet.note(rank, content)

    def _answers(self, patience_s: float = 60.0) -> list[tuple[int, Answer]]:
        """What the participants say; raises and blocks as ``RemoteWorkers.attend``."""
        notes = self._fleet.attend(patience_s)
        return [(rank, msgspec.msgpack.decode(content, type=Answer)) for rank, content in notes]

    def _await(self, kind: type[Answer], within_s: float, ranks: int) -> dict[int, Answer]:
        """An answer of a kind from each of the first so many participants."""
        answers: dict[int, Answer] = {}
        end = time.monotonic() + within_s
        while len(answers) < ranks:
            answers |= {rank: answer for rank, answer in self._answers(within_s) if isinstance(answer, kind)}
            if time.monotonic() > end:
                missing = next(rank for rank in range(ranks) if rank not in answers)
                raise RunFailed(
                    f"rank {missing} on {self._hosts[missing]} did not answer within {within_s:.0f} s: look at what "
                    "it printed on its host",
                    stage=missing,
                )
        return answers
