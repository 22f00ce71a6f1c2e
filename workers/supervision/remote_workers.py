"""The driver's side of a run of many ranks: a connection to every rank's agent, and the verdict of `Supervisor`.

    with RemoteWorkers(...) as workers:
        workers.gather(reception, ...)              every rank said hello, and the clocks are compared
        with workers.prepared(resolved, ...):       every rank agrees with its task
            for record in workers.run(run_dir):     what the workers report, on the driver's clock

Connections stay open until `hang_up`: an agent exits once its connection is closed, and torchrun ends all ranks once
one has exited, so the driver first reports what went wrong.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

from pipeline.errors import PlanError
from pipeline.run.resolved import Resolved
from workers.errors import RunFailed
from workers.supervision import control_records as control
from workers.supervision.control_socket import LOOK_EVERY_S, ControlSocket, Reception, wait_for
from workers.supervision.rank_connection import RankConnection
from workers.supervision.supervisor import Heard, Supervisor
from workers.telemetry import records
from workers.telemetry.status_table import Status
from workers.wiring.edges import rendezvous
from workers.worker.assignment import files_in

__all__ = ["RemoteWorkers"]

_PREPARED_WITHIN_S = 300.0
_LAST_WORDS_WITHIN_S = 1.0
_STACKS_WITHIN_S = 2.0
_REASON_WITHIN_S = 1.5
_STOPPED_WITHIN_S = 6.0
_ALIVE_EVERY_S = 5.0
_SILENT_S = 60.0
_STALL_FIRST_S = 0.5  # a run that stands still is a stall, whoever is silent
_STATUS_OF: dict[type, int] = {type(None): 0, PlanError: 2, KeyboardInterrupt: 130, object: 1}


class RemoteWorkers(Supervisor):
    """The agents of one run, and their workers: one of each per rank, ``world`` of them.

    ``lost``: (rank, seconds to wait for an answer) -> what whoever started an agent knows about its end; None: nothing,
    or that it lives.
    """

    def __init__(
        self, world: int, asked: Callable[[], bool], lost: Callable[[int, float], str | None] | None = None
    ) -> None:
        super().__init__(asked)
        self.members: list[RankConnection] = []
        self._world, self._lost = world, lost or (lambda rank, within_s: None)
        self._met: tuple[Reception, float, str] | None = None
        self._stopped = False
        self._patience_s = _SILENT_S
        self._alive_at = float("-inf")

    def gather(self, reception: Reception, within_s: float, memory: str) -> None:
        """Wait for all agents, and compare clocks with those on other hosts.

        Blocks until all have come, ``within_s`` at most, and 30 s for the answers. ``memory`` names the shared memory
        that this process sees, as in `control_records.Hello`.

        Raises:
            PlanError: somebody did not come, or says why it cannot take part.
            KeyboardInterrupt: this process was asked to end.
        """
        end, wires = time.monotonic() + within_s, list[ControlSocket]()
        while len(wires) < self._world and time.monotonic() < end:
            if self.asked():
                raise KeyboardInterrupt
            if (wire := reception.accept(LOOK_EVERY_S)) is not None:
                wires.append(wire)
            elif dead := {rank: why for rank in range(self._world) if (why := self._lost(rank, 0.0))}:
                raise PlanError(*(f"rank {rank} has ended before it came: {why}." for rank, why in dead.items()))
        self.members = [RankConnection(wire) for wire in wires]
        for member in self.members:
            member.hello = member.answer(control.Hello, self.asked)
        self.members.sort(key=lambda member: member.hello.rank)
        if missing := sorted(set(range(self._world)) - {member.hello.rank for member in self.members}):
            raise PlanError(
                f"ranks {', '.join(map(str, missing))} of {self._world} did not come within {within_s:.0f} s: look at "
                "what was printed on their hosts, and whether they can connect to "
                f"{reception.host}:{reception.port} (see GLOO_SOCKET_IFNAME in docs/deployment.md)."
            )
        hellos = [member.hello for member in self.members]
        if problems := [f"rank {one.rank} on {one.host}: {problem}" for one in hellos for problem in one.problems]:
            raise PlanError(*problems)
        self._met = reception, within_s, memory
        for member in self.members:
            if member.hello.memory != memory:
                member.compare_clocks(self.asked)

    @contextlib.contextmanager
    def anew(self) -> Iterator[RemoteWorkers]:
        """The same agents with new connections, which they open, for one run; hangs up on the way out."""
        assert self._met is not None, "gather comes first"
        workers = RemoteWorkers(self._world, self.asked, self._lost)
        try:
            with workers:
                workers.gather(*self._met)
                yield workers
        finally:
            workers.hang_up()

    @property
    def address(self) -> str:
        """Of this host, as the agents reach it."""
        assert self._met is not None, "gather comes first"
        return self._met[0].host

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
    def hellos(self) -> list[control.Hello]:
        """How every rank has introduced itself."""
        return [member.hello for member in self.members]

    @contextlib.contextmanager
    def prepared(self, resolved: Resolved, profile: Mapping[str, str]) -> Iterator[Self]:
        """Tell every agent its task, wait until all agree, and host where their workers meet, if they have to.

        Blocks while the agents load the recipe and try the model once, 300 s at most. ``profile``: see
        `control_records.Task`.

        Raises:
            PlanError: an agent cannot do it; what differs, and where.
        """
        self.resolved, hosts = resolved, self.hosts
        makers: dict[str, RankConnection] = {}
        with rendezvous(resolved, self.address) as meeting:
            where = (meeting.host, meeting.port) if meeting else None
            for member, host in zip(self.members, hosts, strict=True):
                maker = makers.setdefault(host, member)
                mine = maker.hello.prefix, maker is member, where
                member.tell(control.Task(list(resolved.sizes), hosts, *mine, dict(profile), list(resolved.devices)))
            problems: list[str] = []
            for rank, record in self.until(control.Prepared, _PREPARED_WITHIN_S):
                if isinstance(record, control.Prepared):
                    problems += [f"rank {rank} on {self.host(rank)}: {text}" for text in record.problems]
            if problems:
                raise PlanError(*problems)
            yield self

    def run(self, run_dir: Path) -> Iterator[records.Record]:
        """Start the workers, then the training; see `Supervisor.trained`.

        An agent in this process has its worker write into ``run_dir``, the others send its files.
        """
        assert self.resolved is not None, "prepared comes before run"
        assert self._met is not None, "and gather before that"
        self.run_dir = run_dir
        for rank, member in enumerate(self.members):
            replica, stage = divmod(rank, self.resolved.plan.stages)
            member.files = files_in(run_dir, stage, replica)
            own = (member.hello.pid, member.hello.memory) == (os.getpid(), self._met[2])
            member.tell(control.Start(str(run_dir) if own else None))
        yield from self.trained()

    @property
    def workers(self) -> Sequence[int]:
        return range(self._world)

    def hear(self) -> list[Heard]:
        wait_for(*(member.wire for member in self.members if member.gone is None))
        if time.monotonic() - self._alive_at > _ALIVE_EVERY_S:
            self._alive_at = time.monotonic()
            self._tell(control.ReadClock())
        heard: list[Heard] = []
        for rank, member in enumerate(self.members):
            why = self._lost(rank, 0.0) if member.gone is None else None  # if so, it has said all it will
            heard += [(rank, record) for record in member.drain()]
            if member.wire.silent_s() > self._patience_s:
                why = why or f"no word from it for {self._patience_s:.0f} s"
            member.gone = member.gone or why
            if member.gone is not None:
                heard.append((rank, control.RankGone(member.gone)))
        return heard

    def until(self, last: type[control.Control], patience_s: float) -> Iterator[Heard]:
        self._patience_s = patience_s + _STALL_FIRST_S
        return super().until(last, patience_s)

    def read(self, worker: int) -> Status:
        return self.members[worker].status

    def process(self, worker: int) -> tuple[str, str]:
        member = self.members[worker]
        return f"pid {member.pid} on {member.hello.host}", member.state

    def host(self, worker: int) -> str:
        return self.members[worker].hello.host

    def go(self) -> None:
        self._tell(records.Go())

    def end_early(self) -> None:
        stages = self.resolved.plan.stages if self.resolved is not None else self._world
        for member in self.members[::stages]:
            member.tell(control.Enough())

    def dump(self) -> None:
        self._tell(control.Dump())
        end = time.monotonic() + _STACKS_WITHIN_S
        while time.monotonic() < end:
            self.hear()

    def end(self, error: BaseException | None = None) -> None:
        """End all workers, and wait 6 s at most until their agents have cleaned up; these exit after `hang_up`."""
        if self._stopped:
            return
        self._stopped = True
        self._tell(control.Stop(next(status for kind, status in _STATUS_OF.items() if isinstance(error, kind))))
        end = time.monotonic() + _STOPPED_WITHIN_S
        while time.monotonic() < end and not all(m.gone or control.AgentStopped in m.words for m in self.members):
            self.hear()

    def hang_up(self) -> None:
        """Let the agents go."""
        for member in self.members:
            member.wire.close()

    def note(self, rank: int, content: bytes) -> None:
        """Tell one agent something that is not about a run of these workers (`control_records.Note`)."""
        self.members[rank].tell(control.Note(content))

    def attend(self, patience_s: float = _SILENT_S) -> list[tuple[int, bytes]]:
        """The notes that came, (rank, content), from agents that are not in a run of these workers.

        To be called often while they do anything; an agent may be silent for ``patience_s``. Blocks 0.2 s at most.

        Raises:
            RunFailed: an agent is gone, or silent for too long.
            KeyboardInterrupt: this process, or an agent, was asked to end.
        """
        self._patience_s = patience_s
        return [(rank, record.content) for rank, record in self.hear_or_raise() if isinstance(record, control.Note)]

    def interrupt(self) -> NoReturn:
        """Torchrun, because a rank died, or the user: a failure that is heard within 1 s goes before."""
        end = time.monotonic() + _LAST_WORDS_WITHIN_S
        while time.monotonic() < end and not all(member.quiet for member in self.members):
            self.raise_failure(self.hear())
        super().interrupt()

    def gone(self, worker: int, record: control.RankGone) -> RunFailed:
        """A rank is gone; asks whoever started it once more for the reason, at most 1.5 s."""
        hello, batch, (stage, name) = self.members[worker].hello, self.read(worker).batch, self.place(worker)
        why = self._lost(worker, _REASON_WITHIN_S) or record.why
        return RunFailed(
            f"{name}: rank {worker} (pid {hello.pid} on {hello.host}) is gone without a word ({why}): "
            "it was killed, or its host or the network is down; look at the system's log there",
            stage=stage,
            batch=batch if batch >= 0 else None,
        )

    def _tell(self, record: control.Control) -> None:
        """Tell all that can be reached."""
        for member in self.members:
            member.tell(record)
