"""A fresh process for one job, as whoever waits for it sees it: what it says, how it died, its end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from workers.processes.context import process_context
from workers.processes.end_with_parent import end_with_the_parent

__all__ = ["Child", "ChildDied", "ending"]


class ChildDied(Exception):
    """A child ended without a word: ``was killed by SIGKILL``, ``ended with exit code 3``."""


class Child:
    """A process that runs ``work(pipe, *arguments)``, a function of a module, and says things over ``pipe``.

    It stays until it is killed or this end of the pipe is closed, ends with this process, and ignores Ctrl-C.
    """

    def __init__(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        context = process_context(work.__module__)
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(work, theirs, arguments), name=name, daemon=True)
        try:
            self._process.start()
        finally:
            theirs.close()
        self.pid = self._process.pid

    def fileno(self) -> int:
        """For ``multiprocessing.connection.wait``: ready when it has said something, or died."""
        return self.pipe.fileno()

    def take(self) -> Any:
        """The next thing it says; blocks until it comes, and 2 s for the exit code of a process that died.

        Raises:
            ChildDied: it ended without saying anything more.
        """
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(2.0)
            code = self._process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise ChildDied(how) from None

    def kill(self) -> None:
        """End it. Does not block; `reap` afterwards."""
        self._process.kill()

    def reap(self) -> None:
        """Wait until it has ended; at most 5 s."""
        self._process.join(5.0)
        self.pipe.close()


@contextlib.contextmanager
def ending(children: Sequence[Child]) -> Iterator[None]:
    """On the way out all children have ended, also those that were added meanwhile."""
    try:
        yield
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.reap()


def _main(work: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_the_parent()
    work(pipe, *arguments)
    pipe.poll(None)
