"""How processes are made: from a fork server that has imported the slow packages once.

A fresh interpreter per worker spends seconds on ``import torch``; the fork server spends them once per program. It has
one thread, has computed nothing and holds nothing of the driver's, so its children are as clean as spawned ones. Like
with spawn, the functions a worker runs are imported by name.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver, util
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

__all__ = ["end_fork_server", "listener", "process_context"]


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


def listener() -> Path | None:
    """Where this program's fork server listens; starts it. It stays behind when this program is killed.

    Returns:
        the path of the socket; None: this version of multiprocessing does not tell.
    """
    forkserver.ensure_running()
    address = getattr(forkserver._forkserver, "_forkserver_address", None)
    return Path(address) if isinstance(address, str) and address.startswith("/") else None


def end_fork_server() -> None:
    """End this program's fork server and remove its folder, as Python does at exit: for programs that somebody kills.

    Blocks:
        until the server is gone; it has nothing to do but to end, once no worker is there.
    """
    server: Any = forkserver._forkserver
    server._stop()
    finalizers: Any = util
    finalizers._run_finalizers()
