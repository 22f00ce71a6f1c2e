"""How processes are made: from a fork server that has imported the slow packages once.

A fresh interpreter per worker spends seconds on ``import torch``; the fork server spends them once per program. It has
one thread, has computed nothing and holds nothing of the driver's, so its children are as clean as spawned ones. Unlike
with spawn, they do not run the program's main module again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess, current_process
from pathlib import Path
from typing import Any

from workers.errors import RunFailed

__all__ = [
    "end_fork_server",
    "forget_fork_server",
    "listener",
    "own_temporary_folder",
    "process_context",
    "remove_listener",
]


class _Process(ForkServerProcess):
    """A process whose start says what is wrong where the fork server is gone."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:  # noqa: N802  # multiprocessing's name
        listener()
        try:
            with _main_left_alone():
                return ForkServerProcess._Popen(process_obj)
        except (EOFError, ConnectionError) as error:
            raise RunFailed(
                f"{process_obj.name} could not be started: the process that all workers come from has ended "
                f"({type(error).__name__}). Somebody ended it, or it says above what went wrong; start again.",
                stage=None,
            ) from error


@contextlib.contextmanager
def _main_left_alone() -> Iterator[None]:
    """What multiprocessing tells a child meanwhile has the paths of the program, but not its main module to run."""
    with _telling:
        whole = spawn.get_preparation_data
        bare = {"init_main_from_name", "init_main_from_path"}
        spawn.get_preparation_data = lambda name: {k: v for k, v in whole(name).items() if k not in bare}
        try:
            yield
        finally:
            spawn.get_preparation_data = whole


_telling = threading.Lock()


class _Context(ForkServerContext):
    Process = _Process


def process_context(*modules: str) -> ForkServerContext:
    """The context all our processes come from.

    Args:
        modules: what the first caller wants imported ahead, besides the worker; later callers' are imported by their
            processes.
    """
    context = _Context()
    # freewheel comes first: the server begins in the user's folder, where files may have the names of our packages.
    # torch imports _dynamo when the first optimizer is built, which takes seconds and would be paid by every worker.
    context.set_forkserver_preload(
        ["freewheel", "workers.processes.fork_server", "torch._dynamo", "workers.worker.main", *modules]
    )
    return context


def listener() -> Path | None:
    """Where this program's fork server listens; starts it.

    Ctrl-C goes to all processes of a terminal, and would end the server while it imports, long before multiprocessing
    has it ignored: it starts with SIGINT blocked, and ``workers.processes.fork_server``, which it imports first, ignores it.

    Returns:
        the path of the socket; None: this version of multiprocessing does not tell.
    """
    resource_tracker.ensure_running()  # on the way it would unblock what is blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
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
    programs that somebody may kill before. No further process comes from that server; those that have live on.
    """
    for finalizer in list(getattr(util, "_finalizer_registry", {}).values()):
        if getattr(finalizer, "_callback", None) is getattr(util, "_remove_temp_dir", util):
            finalizer()


def own_temporary_folder() -> None:
    """Have multiprocessing make a folder for this process when it needs one: a process inherits the name of its
    parent's, which `forget_fork_server` removes.
    """
    current_process()._config["tempdir"] = None  # type: ignore[attr-defined]


def end_fork_server() -> None:
    """Remove its folder, and end this program's fork server.

    Blocks:
        until the server is gone; it has nothing to do but to end, once no worker is there.
    """
    forget_fork_server()
    server: Any = forkserver._forkserver
    with contextlib.suppress(FileNotFoundError):  # it would remove the socket
        server._stop()
