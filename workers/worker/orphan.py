"""What a worker does once its driver, or its agent, is dead: there is nobody left to end it and to tidy up."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection as mp_connection
from multiprocessing import parent_process
from pathlib import Path

from workers.processes.context import remove_listener
from workers.wiring.run_memory import unlink_all
from workers.worker.assignment import Assignment

__all__ = ["ends_with_the_driver"]

_TIDY_WITHIN_S = 10.0


@contextlib.contextmanager
def ends_with_the_driver(assignment: Assignment, listener: Path | None) -> Iterator[None]:
    """Watch, from a thread, over the process that started this one; when it dies, end with everything started here.

    What the dead one would have removed goes first: the names in shared memory, and ``listener``, its fork server's
    socket. On the way out, where the driver is dead, it blocks until the thread has tidied up and killed this process.
    """
    driver = parent_process()
    if driver is None:  # called directly, in a test
        yield
        return

    def watch() -> None:
        mp_connection.wait([driver.sentinel])
        try:
            unlink_all(assignment.resolved, assignment.names)
            remove_listener(listener)
        finally:
            os.killpg(os.getpgid(0), signal.SIGKILL)

    thread = threading.Thread(target=watch, name="driver-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        if mp_connection.wait([driver.sentinel], 0.0):
            thread.join(_TIDY_WITHIN_S)
