"""A child process that works for nobody once the program that asked for it has died."""

from __future__ import annotations

import os
import threading
from multiprocessing import connection as mp_connection
from multiprocessing import parent_process

__all__ = ["end_with_the_parent"]


def end_with_the_parent() -> None:
    """In a child: a thread ends the process at once when its parent has died. Does not block."""
    parent = parent_process()
    assert parent is not None, "a child has a parent"

    def watch() -> None:
        mp_connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
