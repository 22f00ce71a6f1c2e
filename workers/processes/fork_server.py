"""What the fork server imports first, and nobody else: it ignores Ctrl-C, which is for the program that started it, and
so do its children; when it ends, it removes its socket and the folder of that.

Python leaves this to the program that started the server, which may be killed. The server ends once that program and
all processes that came from the server are gone.
"""

from __future__ import annotations

import atexit
import os
import signal
from multiprocessing import forkserver
from pathlib import Path

from workers.processes.context import remove_listener

__all__ = ["removes_its_listener"]


def removes_its_listener(server: int) -> None:
    """Remove the socket this process listens on if it is ``server``; children, which inherit this, remove nothing."""
    address = getattr(forkserver._forkserver, "_forkserver_address", None)
    if os.getpid() == server and isinstance(address, str) and address.startswith("/"):
        remove_listener(Path(address))


atexit.register(removes_its_listener, os.getpid())
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked until now, see workers.processes.context.listener
