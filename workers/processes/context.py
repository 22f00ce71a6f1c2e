"""How processes are made: from a fork server that has imported the slow packages once.

A fresh interpreter per worker spends seconds on ``import torch``; the fork server spends them once per program. It has
one thread and has computed nothing, so its children are as clean as spawned ones, and do not run the program's main
module again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess, current_process
from pathlib import Path
from typing import Any

from pipeline.errors import PlanError
from workers.errors import RunFailed
from workers.files import no_temporary_file

__all__ = [
    "NO_STATUS",
    "end_fork_server",
    "end_of_fork_server",
    "folder_for_sockets",
    "forget_fork_server",
    "has_own_temporary_folder",
    "listener",
    "process_context",
    "remove_listener",
    "socket_here",
]

NO_STATUS = 255
"""Exit code of a process of which multiprocessing knows no other: the fork server would have told it, and has ended."""


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:  # noqa: N802  # multiprocessing's name
        listener()
        try:
            with _main_left_alone():
                return ForkServerProcess._Popen(process_obj)
        except (EOFError, ConnectionError) as error:
            why = end_of_fork_server() or "the process that all workers come from has ended; start again"
            raise RunFailed(f"{process_obj.name} could not be started: {why}", stage=None) from error


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
    """The context all our processes come from; ``modules`` are what the first caller wants imported ahead as well."""
    context = _Context()
    # freewheel comes first: the server begins in the user's folder, where files may have the names of our packages.
    # torch imports _dynamo when the first optimizer is built, which takes seconds and would be paid by every worker.
    ahead = ["freewheel", "workers.processes.fork_server", "torch._dynamo", "workers.worker.main"]
    context.set_forkserver_preload([*ahead, *modules])
    return context


def listener() -> Path | None:
    """The path of the socket at which this program's fork server listens; starts it. None: multiprocessing won't tell.

    Ctrl-C goes to all processes of a terminal, and would end the server while it imports, long before multiprocessing
    has it ignored: it starts with SIGINT blocked, and ``fork_server``, which it imports first, ignores it. SIGTERM goes
    to a whole process group as well, where torchrun ends a rank. The server, which reaps the workers, has it blocked,
    and so have its children until they unblock it; the server ends by itself, after the program and all of them.

    Raises PlanError where there is no folder for the socket.
    """
    _make_room_for_sockets()
    resource_tracker.ensure_running()  # on the way it would unblock what is blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return socket_here()


def socket_here() -> Path | None:
    """As `listener`, of a server that may have been started; in the server itself its own."""
    address = getattr(forkserver._forkserver, "_forkserver_address", None)
    return Path(address) if isinstance(address, str) and address.startswith("/") else None


def folder_for_sockets(below_bytes: int) -> str:
    """$TMPDIR, or a shorter place if a socket whose path goes on for ``below_bytes`` does not fit; or PlanError."""
    try:
        usual = tempfile.gettempdir()
    except OSError as error:
        raise no_temporary_file(error) from error
    most = 107 - below_bytes  # on Linux
    for place in (usual, os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp"):
        if place and len(os.fsencode(place)) <= most and os.access(place, os.W_OK | os.X_OK):
            return place
    raise PlanError(
        f"TMPDIR is {usual}: too long for the path of a socket in it, and there is no shorter place; set TMPDIR to a "
        f"folder of at most {most} bytes."
    )


def _make_room_for_sockets() -> None:
    """Have multiprocessing's folder made, where its sockets' paths are short enough."""
    if current_process()._config.get("tempdir") is None:  # type: ignore[attr-defined]
        place, usual = folder_for_sockets(len("/pymp-01234567/listener-01234567")), tempfile.gettempdir()
        tempfile.tempdir = place
        try:
            util.get_temp_dir()
        except OSError as error:
            raise no_temporary_file(error) from error
        finally:
            tempfile.tempdir = usual


def end_of_fork_server() -> str | None:
    """How this program's fork server ended, with where to look; None: it is there. Leaves it to others to reap.

    Blocks 0.5 s at most: what it had open is closed a moment before it has ended.
    """
    pid: int | None = getattr(forkserver._forkserver, "_forkserver_pid", None)
    end = time.monotonic() + 0.5
    while pid is not None:
        try:
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # somebody else has reaped it
            return f"the process that all workers come from (pid {pid}) has ended; start again"
        if ended is not None:
            how = f"ended with exit code {ended.si_status}; what it printed stands above, if it said anything"
            if ended.si_code != os.CLD_EXITED:
                name = signal.Signals(ended.si_status).name
                how = f"was ended by signal {ended.si_status} ({name}); look at the system's log for who did that"
            return f"the process that all workers come from (pid {pid}) {how}"
        if time.monotonic() >= end:
            break
        time.sleep(0.01)
    return None


def remove_listener(listener: Path | None) -> None:
    """Remove the socket of a fork server whose program was killed, and its folder if nothing of the user's is in it."""
    with contextlib.suppress(OSError):
        if listener is not None:
            listener.unlink(missing_ok=True)
            listener.parent.rmdir()


def forget_fork_server() -> None:
    """Remove the fork server's socket and its folder, as Python does at exit: somebody may kill this program before.

    No further process comes from that server; those that have live on.
    """
    for finalizer in list(getattr(util, "_finalizer_registry", {}).values()):
        if getattr(finalizer, "_callback", None) is getattr(util, "_remove_temp_dir", util):
            finalizer()


def has_own_temporary_folder(process: BaseProcess) -> None:
    """Have a process, not yet started, make its own folder if it needs one: `forget_fork_server` removes this one's."""
    process._config["tempdir"] = None  # type: ignore[attr-defined]


def end_fork_server() -> None:
    """Remove its folder, and end this program's fork server. Blocks until it is gone, once no worker is there."""
    forget_fork_server()
    server: Any = forkserver._forkserver
    with contextlib.suppress(FileNotFoundError):  # it would remove the socket
        server._stop()
