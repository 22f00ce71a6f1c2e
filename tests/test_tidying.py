"""Calls that only tidy up may not keep a program from ending, nor change how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.show.bounded_exit import leave, tidied


def test_what_a_call_raises_is_dropped() -> None:
    done: list[str] = []
    assert tidied(10.0, lambda: done.append("tidied up"))
    assert tidied(10.0, lambda: 1 / 0)
    assert done == ["tidied up"]
    with pytest.raises(SystemExit) as left:
        leave(3)
    assert left.value.code == 3


def test_a_program_whose_library_hangs_ends_with_its_own_status_and_words(tmp_path: Path) -> None:
    """The library's other calls are not made, and what it wants to do at exit is not either; our own files go."""
    program = """if True:
        import atexit, sys, threading
        from multiprocessing import util
        from launch.show.bounded_exit import leave, tidied
        atexit.register(threading.Event().wait)
        print(util.get_temp_dir())
        assert not tidied(0.1, threading.Event().wait)
        assert not tidied(10.0, lambda: print("never"))
        print("the verdict", file=sys.stderr)
        leave(1)
    """
    root = str(Path(__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": root, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (1, "the verdict\n")
    assert ended.stdout.startswith(f"{tmp_path}/pymp-")
    assert "never" not in ended.stdout
    assert not list(tmp_path.iterdir())
