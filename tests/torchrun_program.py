"""torchrun as a program for tests: everything it starts is found by a tag in the environment, and ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

HERE = Path(__file__).parent
_TAG = "FREEWHEEL_TEST"
_OF_OTHERS = ("torchelastic_", "torchinductor_", "ray")
"""What torchrun, torch and Ray leave in $TMPDIR, however they end."""


def left_in(folder: Path) -> list[str]:
    """What Freewheel, or multiprocessing on its behalf, has left in a $TMPDIR."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(_OF_OTHERS))


class Program:
    """A command with a $TMPDIR of its own, and everybody that belongs to it.

    Args:
        command: the command.
        cwd: where it runs.
        env: more environment; None: without that variable.
    """

    def __init__(self, command: Sequence[str], cwd: Path, env: Mapping[str, str | None] | None = None) -> None:
        self.tag = uuid.uuid4().hex
        self.temp = Path(tempfile.mkdtemp(prefix="fw"))  # short, as there will be sockets in it
        self._shared_before, self._pids, self._over = _shared(), set[int](), threading.Event()
        path = os.pathsep.join([str(HERE.parent), str(HERE)])
        wanted = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(self.temp), _TAG: self.tag, **(env or {})}
        self.process = subprocess.Popen(
            command,
            env={name: value for name, value in wanted.items() if value is not None},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._looking = threading.Thread(target=self._look, name="family", daemon=True)
        self._looking.start()

    def wait_for(self, text: str, within_s: float = 150.0) -> None:
        """Block until a line of stdout has a text; whoever is late is killed."""
        assert self.process.stdout is not None
        late = threading.Timer(within_s, self.kill)
        late.start()
        try:
            said = list(itertools.takewhile(lambda line: text not in line, self.process.stdout))
            assert self.process.poll() is None, f"no '{text}' within {within_s} s: {''.join(said)}"
        finally:
            late.cancel()
            late.join()

    def ended(self, within_s: float = 150.0) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) once it has ended by itself, and nobody and nothing of it is left."""
        out, err = self.process.communicate(timeout=within_s)
        deadline = time.monotonic() + 60.0
        while (left := self.family()) and time.monotonic() < deadline:
            psutil.wait_procs(left, timeout=0.2)
        assert not left, f"processes left behind: {left}\n{err}"
        assert not self.left_in_shared_memory(), f"{self.left_in_shared_memory()}\n{err}"
        assert not left_in(self.temp), f"{left_in(self.temp)} in $TMPDIR\n{err}"
        return self.process.returncode, out, err

    def family(self) -> list[psutil.Process]:
        """All living processes of it, orphans included."""
        found = [process for process in psutil.process_iter() if _environment(process).get(_TAG) == self.tag]
        self._pids |= {process.pid for process in found}
        return found

    def left_in_shared_memory(self) -> list[str]:
        """What has come into /dev/shm since, and belongs to a process of it that is no more."""
        new = _shared() - self._shared_before
        owners = {name: re.search(r"fw-(\d+)-", name) for name in new}
        mine = {name: int(owner[1]) for name, owner in owners.items() if owner and int(owner[1]) in self._pids}
        return sorted(name for name, owner in mine.items() if not psutil.pid_exists(owner))

    def _look(self) -> None:
        """Who belongs to it, twice a second: what it leaves in shared memory bears their numbers, as others' does."""
        while not self._over.wait(0.5):
            self.family()

    def kill(self) -> None:
        """End everybody."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        """End everybody, and remove what anybody left in $TMPDIR."""
        self._over.set()
        self._looking.join(10.0)
        self.kill()
        self.process.communicate(timeout=10)
        shutil.rmtree(self.temp, ignore_errors=True)


class Torchrun(Program):
    """One ``torchrun ... -m launch ARGUMENTS``, and everybody that belongs to it.

    Args:
        arguments: of Freewheel's command.
        cwd: where it runs.
        ranks: ranks on this host.
        options: more options of torchrun.
        prefix: a command that starts it, such as ``ip netns exec NAME``.
        env: more environment.
    """

    def __init__(
        self,
        arguments: str,
        cwd: Path,
        ranks: int = 2,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *options]
        super().__init__([*prefix, *launcher, "-m", "launch", *arguments.split()], cwd, env)

    def rank(self, index: int) -> psutil.Process:
        """The process of a rank."""
        (found,) = (process for process in self._of_rank(index) if "launch" in process.cmdline())
        return found

    def worker(self, index: int) -> psutil.Process:
        """The worker of a rank: the child of its fork server."""
        (found,) = (p for p in self._of_rank(index) if (parent := p.parent()) and "forkserver" in str(parent.cmdline()))
        return found

    def _of_rank(self, index: int) -> list[psutil.Process]:
        return [process for process in self.family() if _environment(process).get("RANK") == str(index)]


@contextlib.contextmanager
def torchrun(arguments: str, cwd: Path, **how: object) -> Iterator[Torchrun]:
    """Start it; whatever happens, nobody of it outlives the block."""
    program = Torchrun(arguments, cwd, **how)  # type: ignore[arg-type]
    try:
        yield program
    finally:
        program.close()


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except psutil.Error:
        return {}


def _shared() -> set[str]:
    folder = Path("/dev/shm")
    return {entry.name for entry in folder.iterdir() if "fw-" in entry.name} if folder.is_dir() else set()
