"""The head of a Ray cluster, as a run sees it: a socket that takes connections, or none that does."""

from __future__ import annotations

import socket

import pytest

from launch.on_ray.head import RayHead, connects
from launch.on_ray.launcher import _asked_with
from workers.errors import RunFailed
from workers.supervision.control_socket import Reception
from workers.supervision.remote_workers import RemoteWorkers


def test_a_head_that_is_silent_for_too_long_is_a_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        silent = f"the Ray cluster's head at {address} does not answer ([Errno 111] Connection refused)"
        patient, impatient = RayHead(address, patience_s=1e6), RayHead(address, patience_s=0.0)
        for head in (patient, impatient):
            head.look()
            assert head.problem() is None
        assert connects(address) is None
        assert impatient.silent(1.0) is None
    patient.look()
    impatient.look()
    assert patient.problem() is None, "it may be started anew"
    problem = impatient.problem()
    assert problem is not None
    assert problem.startswith(f"{silent}, for 0 s now, and Ray ends whatever is connected to it after 60 s: look ")
    assert patient.silent(1.0) == silent
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        impatient.look()
    assert impatient.problem() is None, "it is back"


def test_a_head_is_looked_at_again_and_again_until_the_run_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10.0)
        head = RayHead(f"127.0.0.1:{server.getsockname()[1]}", look_every_s=0.01)
        with head:
            for _ in range(3):
                server.accept()[0].close()
        assert not head._thread.is_alive()


def test_a_problem_of_the_cluster_fails_the_run_wherever_it_waits() -> None:
    asked = _asked_with(lambda: "the head is silent", lambda: False)
    with Reception("127.0.0.1") as reception, pytest.raises(RunFailed, match="the head is silent") as failed:
        RemoteWorkers(1, asked).gather(reception, 60.0, "memory")
    assert failed.value.stage is None
    assert not _asked_with(lambda: None, lambda: False)()
    assert _asked_with(lambda: None, lambda: True)()
