"""The driver's side of a run of many ranks: gather the agents, prepare and start them, listen, end them all.

    with RemoteWorkers(...) as fleet:        hangs up on nobody before the program ends: who hung up last has the word
        fleet.gather(reception, ...)         every rank said hello, and the clocks are compared
        fleet.prepare(tasks)                 every rank agrees with its task
        for record in fleet.run():           what the workers report, on the driver's clock; the first real failure

It is `LocalWorkers` with the workers out of reach: what they do now comes as a record, twice a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection as mp_connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from pipeline.errors import PlanError
from pipeline.plan.replica_layout import called
from pipeline.run.resolved import Resolved
from workers import errors
from workers.channels.names import Names
from workers.supervision import protocol
from workers.supervision.protocol import ControlSocket, Reception
from workers.supervision.rank_link import LOOK_FOR_RECORD_EVERY_S, RankLink
from workers.supervision.stall import Progress
from workers.telemetry import records
from workers.telemetry.status_table import Status
from workers.worker.assignment import Assignment

__all__ = ["RemoteWorkers"]

_PREPARED_WITHIN_S = 300.0
_LAST_WORDS_WITHIN_S = 1.0
_REASON_WITHIN_S = 1.5
_STOPPED_WITHIN_S = 6.0
_ALIVE_EVERY_S = 5.0
_SILENT_S = 60.0


_STATUS_OF: tuple[tuple[type | tuple[type, ...], int], ...] = (
    (type(None), 0),
    (PlanError, 2),
    (KeyboardInterrupt, 130),
    (object, 1),
)


class RemoteWorkers:
    """The agents of one run.

    Args:
        world: number of ranks, which is the number of workers.
        asked: whether somebody asked this process to end (SIGINT, SIGTERM).
        lost: (rank, seconds to wait for an answer) -> what whoever started an agent knows about its end; None: nothing,
            or that it lives.
    """

    def __init__(
        self, world: int, asked: Callable[[], bool], lost: Callable[[int, float], str | None] | None = None
    ) -> None:
        self.members: list[RankLink] = []
        self._world, self._asked, self._lost = world, asked, lost or _unknown
        self._own: RankLink | None = None
        self._resolved: Resolved | None = None
        self._stopped = False
        self._alive_at = 0.0
        self._attended_at = float("-inf")

    def gather(
        self, own: ControlSocket | None, reception: Reception, within_s: float, memory: str | None = None
    ) -> None:
        """Wait for all agents, and compare clocks with those on other hosts.

        Args:
            own: the wire to the agent in this process; None: there is none.
            reception: where the others come.
            within_s: until when they must have come, in seconds.
            memory: names the shared memory that this process sees, as in `control.Hello`; None: that of its own agent.

        Raises:
            PlanError: somebody did not come, or says why it cannot take part.
            KeyboardInterrupt: this process was asked to end.

        Blocks:
            until all are there, at most ``within_s``, and 30 s for the answers.
        """
        end = time.monotonic() + within_s
        wires = [] if own is None else [own]
        while len(wires) < self._world and time.monotonic() < end:
            if self._asked():
                raise KeyboardInterrupt
            if (wire := reception.accept(LOOK_FOR_RECORD_EVERY_S)) is not None:
                wires.append(wire)
            elif dead := {rank: why for rank in range(self._world) if (why := self._lost(rank, 0.0))}:
                raise PlanError(*(f"rank {rank} has ended before it came: {why}." for rank, why in dead.items()))
        self.members = [RankLink(wire) for wire in wires]
        for member in self.members:
            member.hello = member.answer(protocol.Hello, self._asked)
        self._own = None if own is None else self.members[0]
        self.members.sort(key=lambda member: member.hello.rank)
        missing = sorted(set(range(self._world)) - {member.hello.rank for member in self.members})
        if missing:
            raise PlanError(
                f"ranks {', '.join(map(str, missing))} of {self._world} did not come within {within_s:.0f} s: look at "
                "what was printed on their hosts, and whether they can connect to "
                f"{reception.host}:{reception.port} (see GLOO_SOCKET_IFNAME in docs/deployment.md)."
            )
        problems = [(member.hello, problem) for member in self.members for problem in member.hello.problems]
        if problems:
            raise PlanError(*(f"rank {hello.rank} on {hello.host}: {problem}" for hello, problem in problems))
        here = memory or (self._own.hello.memory if self._own else None)
        for member in self.members:
            if member.hello.memory != here:
                member.compare_clocks(self._asked)

    @property
    def hosts(self) -> list[str]:
        """Name of the host of every rank; ranks that share no memory have different ones."""
        names: dict[str, str] = {}
        for member in self.members:
            name, number = member.hello.host, 1
            while member.hello.memory not in names and name in names.values():
                number += 1
                name = f"{member.hello.host}#{number}"
            names.setdefault(member.hello.memory, name)
        return [names[member.hello.memory] for member in self.members]

    @property
    def gpus(self) -> list[int]:
        """How many GPUs the host of every rank has."""
        return [member.hello.gpus for member in self.members]

    @property
    def devices(self) -> list[str]:
        """Where the worker of every rank computes, as whoever started its agent has said."""
        return [member.hello.device for member in self.members]

    @property
    def nccl(self) -> bool:
        """Whether torch has NCCL at every rank."""
        return all(member.hello.nccl for member in self.members)

    def prepare(self, resolved: Resolved, meeting: tuple[str, int] | None, profile: Mapping[str, str]) -> None:
        """Tell every agent its task, and wait until all agree; see ``control.Task``.

        Raises:
            PlanError: an agent cannot do it; what differs, and where.

        Blocks:
            while the agents load the recipe and try the model once, at most 300 s.
        """
        hosts, makers = self.hosts, dict[str, RankLink]()
        for member, host in zip(self.members, hosts, strict=True):
            makers.setdefault(host, member)
        for member, host in zip(self.members, hosts, strict=True):
            maker = makers[host]
            task = protocol.Task(
                list(resolved.sizes),
                hosts,
                maker.hello.prefix,
                maker is member,
                meeting,
                dict(profile),
                list(resolved.devices),
            )
            member.tell(task)
        problems: list[str] = []
        self._resolved = resolved
        for member, record in self._until(protocol.Prepared, _PREPARED_WITHIN_S):
            if isinstance(record, protocol.Prepared):
                problems += [f"rank {member.hello.rank} on {member.hello.host}: {text}" for text in record.problems]
        if problems:
            raise PlanError(*problems)

    def run(self, run_dir: Path, start_within_s: float = 120.0) -> Iterator[records.Record]:
        """Start the workers, then the training, and yield what the workers report, until all have finished.

        Times are on the driver's clock, and the files of all workers lie in ``run_dir`` in the end.

        Raises:
            errors.RunFailed: a worker reported a failure or died, an agent is gone, or nobody made progress.
            KeyboardInterrupt: this process, or an agent, was asked to end.

        Blocks:
            until something is reported; a stalled run ends after the plan's ``stall_after_s``.
        """
        assert self._resolved is not None, "prepare comes before run"
        places = [divmod(rank, self._resolved.plan.stages) for rank in range(self._world)]
        for member, (replica, stage) in zip(self.members, places, strict=True):
            member.files = Assignment(stage, self._resolved, _none, Names(""), run_dir, replica=replica).files
        for member in self.members:
            member.tell(protocol.Start(str(run_dir) if member is self._own else None))
        for _, record in self._until(records.Ready, start_within_s):
            if isinstance(record, records.Ready):
                yield record
        for member in self.members:
            member.tell(records.Go())
        for _, record in self._until(records.Finished, self._resolved.plan.stall_after_s):
            if isinstance(record, records.Observation | records.Finished):
                yield record

    def note(self, rank: int, content: bytes) -> None:
        """Tell one agent something that is not about a run of this fleet; see ``control.Note``. Does not block."""
        self.members[rank].tell(protocol.Note(content))

    def attend(self, patience_s: float = _SILENT_S) -> list[tuple[int, bytes]]:
        """Listen to agents that are not in a run of this fleet; to be called often while they do anything.

        Args:
            patience_s: how long an agent may be silent, in seconds.

        Returns:
            the notes that came: (rank, content).

        Raises:
            errors.RunFailed: an agent is gone, or silent for too long.
            KeyboardInterrupt: this process, or an agent, was asked to end.

        Blocks:
            at most 0.2 s where nothing comes.
        """
        now = time.monotonic()
        if now - self._attended_at > _ALIVE_EVERY_S:  # nobody listened, so nobody was asked
            for member in self.members:
                member.heard = now
        heard = self._hear()
        self._attended_at = time.monotonic()
        for member in self.members:
            member.gone = member.gone or self._lost(member.hello.rank, 0.0)
            if member.gone is None and self._attended_at - member.heard > patience_s:
                member.gone = f"no word from it for {patience_s:.0f} s"
        self._raise_failure(heard)
        if self._asked() or any(isinstance(record, protocol.Interrupted) for _, record in heard):
            self._raise_interrupt()
        return [(member.hello.rank, record.content) for member, record in heard if isinstance(record, protocol.Note)]

    def end_early(self) -> None:
        """Ask the first stages to take no further training batch; all workers finish what is in the pipeline."""
        stages = self._resolved.plan.stages if self._resolved is not None else self._world
        for member in self.members[::stages]:
            member.tell(protocol.Enough())

    def read(self, worker: int) -> Status:
        """What a worker did when last heard of."""
        return self.members[worker].status

    def stop(self, status: int) -> None:
        """End all workers, and wait until their agents have cleaned up; the agents exit once this program has.

        Args:
            status: what the agents exit with.

        Blocks:
            until all have answered, at most 6 s.
        """
        if self._stopped:
            return
        self._stopped = True
        for member in self.members:
            member.tell(protocol.Stop(status))
        end = time.monotonic() + _STOPPED_WITHIN_S
        while time.monotonic() < end and not all(m.gone or protocol.AgentStopped in m.words for m in self.members):
            self._hear()

    def hang_up(self) -> None:
        """Let the agents go. After a failure only once it is reported: torchrun ends everybody when one exits."""
        for member in self.members:
            member.wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(next(status for kinds, status in _STATUS_OF if isinstance(error, kinds)))

    # ------------------------------------------------------------------ private

    def _until(self, last: type, patience_s: float) -> Iterator[tuple[RankLink, protocol.Control]]:
        """What is heard until every agent has sent one record of type ``last``."""
        awaited = set(range(self._world))
        assert self._resolved is not None, "nobody is waited for before prepare"
        progress = Progress(self, self._resolved.plan, patience_s)
        for member in self.members:
            member.heard = time.monotonic()
        while awaited:
            heard = self._hear()
            self._raise_failure(heard)
            if self._asked() or any(isinstance(record, protocol.Interrupted) for _, record in heard):
                self._raise_interrupt()
            for member, record in heard:
                if isinstance(record, last):
                    awaited.discard(member.hello.rank)
                yield member, record
            spoke = {
                m.hello.rank for m, record in heard if not isinstance(record, protocol.WorkerStatus | protocol.Time)
            }
            if progress.stalled(spoke, awaited):
                raise self._stall(patience_s)
            for member in self.members:
                if member.hello.rank in awaited and (why := self._lost(member.hello.rank, 0.0)):
                    member.gone = member.gone or why  # the next look reports it, after what it may still have said
                if time.monotonic() - member.heard > patience_s:
                    raise self._gone(member, f"no word from it for {patience_s:.0f} s")

    def _raise_failure(self, heard: Sequence[tuple[RankLink, protocol.Control]]) -> None:
        """The first thing that went wrong, if any: what a worker says, else a worker's death, else an agent's."""
        wrong = (records.Failure, protocol.WorkerDied)
        if not any(isinstance(record, wrong) for _, record in heard) and not any(m.gone for m in self.members):
            return
        heard = [*heard, *self._hear()]  # the cause was sent before its consequences, but maybe read after
        failed = [(member, record) for member, record in heard if isinstance(record, records.Failure)]
        died = [(member, record) for member, record in heard if isinstance(record, protocol.WorkerDied)]
        if failed and not any(_by_signal(record) for _, record in died):
            member, failure = min(failed, key=lambda one: one[1].time_ns)
            raise errors.RunFailed.from_record(failure, member.hello.host)
        if died:
            member, death = min(died, key=lambda one: one[1].exit_code)
            status = member.status
            stage, name = self._place(member)
            raise errors.killed(stage, death.pid, death.exit_code, status, member.hello.host, name)
        lost = next(member for member in self.members if member.gone)
        raise self._gone(lost, lost.gone or "")

    def _raise_interrupt(self) -> None:
        """Somebody asked this or another rank to end: torchrun, because a rank died, or because the user asked it."""
        end = time.monotonic() + _LAST_WORDS_WITHIN_S
        while time.monotonic() < end and not all(member.quiet for member in self.members):
            self._raise_failure(self._hear())
        raise KeyboardInterrupt

    def _gone(self, member: RankLink, why: str) -> errors.RunFailed:
        rank = member.hello.rank
        why = self._lost(rank, _REASON_WITHIN_S) or why
        stage, name = self._place(member)
        return errors.RunFailed(
            f"{name}: rank {rank} (pid {member.hello.pid} on {member.hello.host}) is gone without a word ({why}): "
            "it was killed, or its host or the network is down; look at the system's log there",
            stage=stage,
            batch=member.status.batch if member.status.batch >= 0 else None,
        )

    def _place(self, member: RankLink) -> tuple[int, str]:
        """The stage of a rank's worker, and what users see the worker called."""
        if self._resolved is None:
            return member.hello.rank, f"stage {member.hello.rank}"
        plan = self._resolved.plan
        replica, stage = divmod(member.hello.rank, plan.stages)
        return stage, called(plan, replica, stage)

    def _stall(self, patience_s: float) -> errors.RunFailed:
        for member in self.members:
            member.tell(protocol.Dump())
        end = time.monotonic() + 2 * _LAST_WORDS_WITHIN_S
        while time.monotonic() < end:
            self._hear()
        workers = [(member.process, member.state) for member in self.members]
        files = self.members[0].files
        stacks = str(files["stacks"].with_name("*stacks-*.txt")) if files else "none"
        assert self._resolved is not None, "nobody is waited for before prepare"
        return errors.nobody_moves(self, workers, patience_s, stacks, self._resolved.plan)

    def _hear(self) -> list[tuple[RankLink, protocol.Control]]:
        """What has been said, times on the driver's clock; waits a moment for something to happen."""
        reachable = [member for member in self.members if member.gone is None]
        mp_connection.wait(cast(Any, [member.wire for member in reachable]), LOOK_FOR_RECORD_EVERY_S)
        if time.monotonic() - self._alive_at > _ALIVE_EVERY_S:
            self._alive_at = time.monotonic()
            for member in reachable:
                member.tell(protocol.ReadClock())
        return [(member, record) for member in reachable for record in member.drain()]


def _by_signal(death: protocol.WorkerDied) -> bool:
    return death.exit_code < 0


def _none() -> Any:
    raise AssertionError("the driver makes no recipe from an assignment")


def _unknown(rank: int, within_s: float) -> None:
    """Nobody knows more than what the wires say."""
