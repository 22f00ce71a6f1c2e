"""How processes are made: from a fork server that has imported the slow packages once.

A fresh interpreter per worker spends seconds on ``import torch``; the fork server spends them once per program. It has
one thread, has computed nothing and holds nothing of the driver's, so its children are as clean as spawned ones. Like
with spawn, the functions a worker runs are imported by name.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing import forkserver, util
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

__all__ = ["end_fork_server", "forget_fork_server", "listener", "process_context", "remove_listener"]


def process_context(*modules: str) -> ForkServerContext:
    """The context all our processes come from.

    Args:
        modules: what the first caller wants imported ahead, besides the worker; later callers' are imported by their
            processes.
    """
    context = multiprocessing.get_context("forkserver")
    # torch imports _dynamo when the first optimizer is built, which takes seconds and would be paid by every worker.
    context.set_forkserver_preload(["workers.fork_server", "torch._dynamo", "workers.worker", *modules])
    return context


def listener() -> Path | None:
    """Where this program's fork server listens; starts it.

    Returns:
        the path of the socket; None: this version of multiprocessing does not tell.
    """
    forkserver.ensure_running()
    address = getattr(forkserver._forkserver, "_forkserver_address", None)
    return Path(address) if isinstance(address, str) and address.startswith("/") else None


def remove_listener(listener: Path) -> None:
    """Remove the socket of a fork server whose program was killed, and multiprocessing's folder, if nothing else is
    in it: there may be sockets of the user's own.
    """
    with contextlib.suppress(OSError):
        listener.unlink(missing_ok=True)
        listener.parent.rmdir()


def forget_fork_server() -> None:
    """Remove multiprocessing's folder with the socket of this program's fork server, as Python does at exit: for
    programs that somebody may kill before. No process comes from that server any more.
    """
    for finalizer in list(getattr(util, "_finalizer_registry", {}).values()):
        if getattr(finalizer, "_callback", None) is getattr(util, "_remove_temp_dir", util):
            finalizer()


def end_fork_server() -> None:
    """Remove its folder, and end this program's fork server.

    Blocks:
        until the server is gone; it has nothing to do but to end, once no worker is there.
    """
    forget_fork_server()
    server: Any = forkserver._forkserver
    with contextlib.suppress(FileNotFoundError):  # it would remove the socket
        server._stop()
