"""Who reads what the command prints: once nobody does, it ends, and has nothing more to say.

freewheel train digits --help | head -3
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator

__all__ = ["ends_with_its_reader"]

_NOBODY = select.POLLERR | select.POLLHUP | select.POLLNVAL


@contextlib.contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """Exit with status 1 as soon as something is printed that nobody can read any more; flush stdout at the end.

    What stdout has no encoding for is printed escaped, as on stderr: the name of a file may be no text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # as it is after >&-
                sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        if not any(event & _NOBODY for _, event in poll.poll(0)):  # it was a connection to somebody else
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # Python flushes once more as it exits
        os.close(nowhere)
        sys.exit(1)
