"""The driver and its agents without torchrun: who may connect, whose clock counts, what a task needs."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection as mp_connection
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import problems
import pytest

from launch.setup.resolve_source import resolve_source
from pipeline import Plan, PlanError
from pipeline.metrics.spans import SPAN_DTYPE, Span
from workers.clock import now_ns
from workers.errors import RunFailed
from workers.supervision import control_records as control
from workers.supervision.control_socket import ControlSocket, Gone, Reception, connect_to
from workers.supervision.remote_workers import RemoteWorkers
from workers.telemetry import records

AHEAD_NS = 5_000_000_000_000
PLAN = Plan(stages=2, sizes=(4, 4), mode="naive", steps=5, stall_after_s=2.0)


@dataclass
class Agent:
    """An agent that does what it is told, and when the training begins what a test wants.

    Attributes:
        wire: to the driver.
        rank: its rank; rank 1 is on a host of its own, whose clock is ahead.
        training: what it does then.
        problems: why it cannot prepare itself.
        heard: all that the driver said, by type.
    """

    wire: ControlSocket
    rank: int
    training: Callable[[ControlSocket], None]
    problems: list[str] = field(default_factory=list)
    heard: dict[type, control.Control] = field(default_factory=dict)

    def run(self) -> None:
        """Until the driver hangs up."""
        host = "ab"[self.rank]
        try:
            self.wire.send(control.Hello(self.rank, os.getpid(), host, f"memory of {host}", f"fw-{host}"))
            while True:
                mp_connection.wait([self.wire], 10.0)  # type: ignore[list-item]
                record = self.wire.receive()
                self.heard[type(record)] = record
                self._answer(record)
        except Gone:
            self.wire.close()

    def _answer(self, record: control.Control) -> None:
        if isinstance(record, control.ReadClock):
            self.wire.send(control.Time(now_ns() + AHEAD_NS * self.rank))
        elif isinstance(record, control.Task):
            self.wire.send(control.Prepared(self.problems))
        elif isinstance(record, control.Start):
            self.wire.send(records.Ready(self.rank, 20 + self.rank, 1))
        elif isinstance(record, records.Go):
            self.training(self.wire)
        elif isinstance(record, control.Stop):
            self.wire.send(control.AgentStopped())


@contextmanager
def _fleet(
    training: Callable[[ControlSocket], None], problems: Sequence[str] = ()
) -> Iterator[tuple[RemoteWorkers, list[Agent]]]:
    """A gathered fleet of two, and its agents; rank 1 does the training that the test is about."""
    fleet = RemoteWorkers(2, lambda: False)
    with Reception("127.0.0.1") as reception:
        trainings = [lambda wire: wire.send(records.Finished(0, 5, 0, 0, 1, now_ns(), now_ns())), training]
        agents: list[Agent] = []

        def come(rank: int) -> None:
            wire = connect_to(reception.host, reception.port, reception.key, 5.0)
            agents.append(Agent(wire, rank, trainings[rank], list(problems) if rank else []))
            agents[-1].run()

        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        fleet.gather(reception, 10.0, "memory of a")
        agents.sort(key=lambda agent: agent.rank)
    try:
        yield fleet, agents
    finally:
        fleet.hang_up()
        for thread in threads:
            thread.join(10.0)
            assert not thread.is_alive()


def test_times_and_spans_come_on_the_clock_of_the_driver(tmp_path: Path) -> None:
    """Rank 1's clock is 5,000 s ahead; its files come in pieces, and the driver alone has a folder."""
    start_ns = now_ns()
    spans = np.array(
        [(Span.FORWARD, 0, 0, start_ns + AHEAD_NS), (Span.OTHER, -1, -1, start_ns + AHEAD_NS + 7)], SPAN_DTYPE
    )

    def training(wire: ControlSocket) -> None:
        wire.send(control.WorkerStatus(Span.FORWARD, 3, now_ns() + AHEAD_NS, 9, "R"))
        wire.send(records.Loss(0, [1.0], now_ns() + AHEAD_NS))
        for what, content in (("spans", _npy(spans)), ("model", b"weights"), ("optimizer", b"")):
            half = len(content) // 2
            wire.send(control.File(what, content[:half], last=False))
            wire.send(control.File(what, content[half:], last=True))
        wire.send(records.Finished(1, 5, 0, 0, 1, now_ns() + AHEAD_NS, now_ns() + AHEAD_NS))

    with _fleet(training) as (fleet, agents):
        resolved = resolve_source(problems.recipe, PLAN)
        with fleet.prepared(resolved, {"torch": "2"}), fleet:
            said = list(fleet.run(tmp_path))
        (loss,) = (record for record in said if isinstance(record, records.Loss))
        assert start_ns < loss.time_ns < now_ns()
        assert start_ns < fleet.read(1).start_ns < now_ns()
        assert (fleet.read(1).span, fleet.read(1).batch) == (Span.FORWARD, 3)
        assert fleet.hosts == ["a", "b"]
        tasks = [agent.heard[control.Task] for agent in agents]
        assert [(task.prefix, task.makes_memory) for task in tasks] == [("fw-a", True), ("fw-b", True)]  # type: ignore[union-attr]
        starts = [agent.heard[control.Start] for agent in agents]
        assert [start.run_dir for start in starts] == [str(tmp_path), None]  # type: ignore[union-attr]
        assert all(agent.heard[control.Stop] == control.Stop(0) for agent in agents)
    written = np.load(tmp_path / "spans" / "stage-1.npy", allow_pickle=False)
    assert np.abs(written["start_ns"] - start_ns).max() < 1e9
    assert np.diff(written["start_ns"]).tolist() == [7]
    assert (tmp_path / "parts" / "model-1.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "parts" / "optimizer-1.safetensors").read_bytes() == b""


def test_a_rank_that_cannot_do_its_task_is_named(tmp_path: Path) -> None:
    with _fleet(lambda wire: None, ["its torch is 1: install the same."]) as (fleet, agents):
        resolved = resolve_source(problems.recipe, PLAN)
        with pytest.raises(PlanError) as caught, fleet, fleet.prepared(resolved, {"torch": "2"}):
            pass
        assert caught.value.problems == ("rank 1 on b: its torch is 1: install the same.",)
        assert [agent.heard[control.Stop] for agent in agents] == [control.Stop(2)] * 2


def test_nobody_moves_although_all_agents_speak(tmp_path: Path) -> None:
    """The stall report is made of what the agents last said."""

    def training(wire: ControlSocket) -> None:
        wire.send(control.WorkerStatus(Span.BACKWARD, 4, now_ns() + AHEAD_NS, 9, "T"))

    with _fleet(training) as (fleet, agents):
        resolved = resolve_source(problems.recipe, PLAN)
        with pytest.raises(RunFailed) as caught, fleet, fleet.prepared(resolved, {}):
            list(fleet.run(tmp_path))
        assert control.Dump in agents[1].heard
    assert "no progress for 2.0 s: stage 1 (pid 21 on b) is in backward batch 4 for" in str(caught.value)
    assert "the process is stopped" in str(caught.value)
    assert "stage 0  waits" in caught.value.details


def test_the_cause_goes_before_its_consequences(tmp_path: Path) -> None:
    """Both are read together; the failure of rank 1 happened first, as times on one clock show."""
    early_ns = now_ns()

    def training(wire: ControlSocket) -> None:
        wire.send(records.Failure(1, 21, "stage 1: late", "", now_ns() + AHEAD_NS + 10**9))
        wire.send(records.Failure(1, 21, "stage 1: early", "trace", early_ns + AHEAD_NS, layer="5", batch=3))

    with _fleet(training) as (fleet, _):
        resolved, told = resolve_source(problems.recipe, PLAN), r"stage 1: early \(pid 21 on b\)"
        with pytest.raises(RunFailed, match=told) as caught, fleet, fleet.prepared(resolved, {}):
            list(fleet.run(tmp_path))
    assert (caught.value.stage, caught.value.layer, caught.value.batch, caught.value.details) == (1, "5", 3, "trace")


def test_strangers_are_not_let_in() -> None:
    with Reception("127.0.0.1") as reception, ThreadPoolExecutor(1) as pool:
        stranger = pool.submit(connect_to, reception.host, reception.port, b"x" * 32, 5.0)
        assert reception.accept(5.0) is None
        with pytest.raises(OSError, match=r"broke off the greeting \(it hung up\): another run's driver"):
            stranger.result(10.0)
        assert reception.accept(0.05) is None, "nobody came"


def test_a_driver_of_another_run_is_recognised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def pretend() -> None:
            accepted, _ = server.accept()
            with Connection(accepted.detach()) as connection:
                connection.send_bytes(b"n" * 32)
                connection.recv_bytes(64)
                connection.send_bytes(b"p" * 32)

        pretending = pool.submit(pretend)
        with pytest.raises(ConnectionError, match="does not know this run's key"):
            connect_to("127.0.0.1", server.getsockname()[1], b"k" * 32, 5.0)
        pretending.result(10.0)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
