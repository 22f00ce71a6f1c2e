"""``freewheel train digits --help | head -3``: who has read enough hangs up, and hears no complaint."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from launch import cli
from launch.show.closed_pipe import ends_with_its_reader


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command sets one."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@contextmanager
def _stdout_without_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """A pipe whose other end is closed, as this process's stdout."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        yield stdout
        stdout.write("what Python flushes at exit goes nowhere, without an error\n")
        stdout.flush()


@pytest.mark.parametrize("size", [10, 1_000_000], ids=["found when flushed", "found when printed"])
def test_what_nobody_reads_ends_the_program_in_silence(
    size: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with _stdout_without_reader(monkeypatch), pytest.raises(SystemExit) as ended, ends_with_its_reader():
        print("x" * size)
    assert ended.value.code == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "digits", "--help"]], ids=" ".join)
def test_the_command_ends_with_its_reader(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with _stdout_without_reader(monkeypatch), pytest.raises(SystemExit) as ended:
        cli.run_command(arguments)
    assert ended.value.code == 1
    assert capfd.readouterr() == ("", "")


def test_a_connection_that_breaks_is_no_reader_that_hangs_up() -> None:
    with pytest.raises(BrokenPipeError, match="the driver"), ends_with_its_reader():
        raise BrokenPipeError("the driver")
