"""What the fork server imports first, and nobody else: it and its children ignore Ctrl-C, which is for their program.

When it ends, once that program and all its children are gone, it removes its socket and the folder of that: Python
leaves this to the program, which may be killed.
"""

from __future__ import annotations

import atexit
import os
import signal

from workers.processes.context import remove_listener, socket_here

__all__ = ["removes_its_listener"]


def removes_its_listener(server: int) -> None:
    """Remove the socket this process listens on if it is ``server``; children, which inherit this, remove nothing."""
    if os.getpid() == server:
        remove_listener(socket_here())


atexit.register(removes_its_listener, os.getpid())
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked until now, see workers.processes.context.listener
