"""An interrupt is never lost and never comes at a bad moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from workers.errors import RunFailed
from workers.processes.interrupts import Interrupts
from workers.supervision.local_workers import LocalWorkers


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test does, the handlers are as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _interrupt(number: signal.Signals = signal.SIGINT) -> None:
    signal.raise_signal(number)


def test_an_interrupt_waits_for_the_safe_point() -> None:
    with Interrupts() as interrupts:
        interrupts.raise_noted()
        _interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_noted()
        interrupts.raise_noted()


def test_an_interrupt_inside_a_finaliser_is_not_lost() -> None:
    class Interrupted:
        def __del__(self) -> None:
            _interrupt()

    with Interrupts() as interrupts:
        thing = Interrupted()
        del thing
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_noted()


def test_an_interrupt_that_nobody_looked_for_is_raised_on_the_way_out() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        _interrupt()


def test_a_failure_goes_before_an_interrupt() -> None:
    def fail() -> None:
        with Interrupts():
            _interrupt()
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        fail()


def test_the_second_interrupt_is_raised_at_once() -> None:
    with Interrupts():
        _interrupt()
        with pytest.raises(KeyboardInterrupt):
            _interrupt()


def test_handlers_are_restored_and_what_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        _interrupt(signal.SIGTERM)
        interrupts.raise_noted()
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def body() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(10)
    assert seen == [before]


# ---------------------------------------------------------------- while a program starts


def _program(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, filter(None, (folder, Path(__file__).parents[1]))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_the_command_is_imported_is_one_line(number: signal.Signals, tmp_path: Path) -> None:
    """It once was a traceback out of whatever was being imported; here that is the first package that is not ours."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text(f"import os\nos.kill(os.getpid(), {number})\n")
    ended = _program("-m", "launch", "train", "digits", folder=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "freewheel: interrupted; nothing is running\n")


@pytest.mark.processes
def test_the_fork_server_outlives_an_interrupt_while_it_imports() -> None:
    """It is as old as a Ctrl-C in the first second finds it; what comes from it ignores Ctrl-C too."""
    ended = _program(
        "-c",
        "import os, signal\n"
        "from multiprocessing import forkserver\n"
        "from workers.processes.context import listener, process_context\n"
        "context = process_context()\n"
        "listener()\n"
        "os.kill(forkserver._forkserver._forkserver_pid, signal.SIGINT)\n"
        "process = context.Process(target=signal.raise_signal, args=(signal.SIGINT,))\n"
        "process.start()\n"
        "process.join(150)\n"
        "print(process.exitcode)\n",
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n", "")


@pytest.mark.parametrize(("interrupted", "expected"), [(True, KeyboardInterrupt), (False, RunFailed)])
def test_workers_that_cannot_start_because_of_an_interrupt_are_no_failure(
    interrupted: bool, expected: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM to the whole group ends the fork server: that was a traceback with an EOFError."""

    def start(process: BaseProcess) -> None:
        if interrupted:
            _interrupt()
        raise EOFError("unexpected EOF")

    monkeypatch.setattr("workers.processes.context.ForkServerProcess._Popen", staticmethod(start))
    monkeypatch.setattr("workers.processes.context.listener", lambda: None)
    monkeypatch.setattr("workers.supervision.local_workers.WakeUp", mock.Mock())
    monkeypatch.setattr("workers.supervision.local_workers.StatusTable", mock.Mock())
    assignment: Any = mock.Mock(called="stage 0")
    with pytest.raises(expected), Interrupts() as interrupts, LocalWorkers([assignment], interrupts.noted) as workers:
        next(workers.run())
