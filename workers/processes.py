"""How processes are made: from a fork server that has imported the slow packages once.

A fresh interpreter per worker spends seconds on ``import torch``; the fork server spends them once per program. It has
one thread, has computed nothing and holds nothing of the driver's, so its children are as clean as spawned ones. Like
with spawn, the functions a worker runs are imported by name.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection as mp_connection
from multiprocessing import forkserver, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext

__all__ = ["end_with_the_parent", "process_context", "start_fork_server"]


def process_context(*modules: str) -> ForkServerContext:
    """The context all our processes come from.

    Args:
        modules: what the first caller wants imported ahead, besides the worker; later callers' are imported by their
            processes.
    """
    context = multiprocessing.get_context("forkserver")
    # torch imports _dynamo when the first optimizer is built, which takes seconds and would be paid by every worker.
    context.set_forkserver_preload(["torch._dynamo", "workers.worker", *modules])
    return context


def start_fork_server() -> None:
    """Start the fork server in a program that torchrun may end, by SIGTERM to its process group.

    The fork server reaps the processes it makes, so it has to outlive them: it and they begin with SIGTERM blocked.
    A signal mask is inherited, and unlike a handler it can be set in any thread.
    """
    resource_tracker.ensure_running()  # it would undo the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_the_parent() -> None:
    """In a child: a thread ends the process at once when the program that asked for it has died. Does not block."""
    parent = parent_process()
    assert parent is not None, "a child has a parent"

    def watch() -> None:
        mp_connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
