"""The environment variables of Ray while this program is connected to it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from workers.processes.context import folder_for_sockets

__all__ = ["ray_environment"]

_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_SOCKET_BYTES = len("/ray/session_2027-01-05_10-02-33_123456_1234567/sockets/plasma_store")


@contextlib.contextmanager
def ray_environment(own: bool, forget: Callable[[], None]) -> Iterator[None]:
    """Set how Ray authenticates, and put back every variable of Ray's, which it changes on its own too.

    How to authenticate is set explicitly meanwhile, as Ray would otherwise decide by itself and leave it set: as
    ``RAY_AUTH_MODE`` says if it is set; else with a token of this run's own for a local Ray, and for another with the
    user's token if there is one. The actors of a local Ray are no nicer than this program, as local workers are not,
    unless ``RAY_worker_niceness`` says so; Ray's own default, 15, leaves them what nobody else wants.

    ``own``: for a Ray of this run's own; ``forget`` has Ray forget the mode and the token that it has read.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    if own:
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_TMPDIR", folder_for_sockets(_SOCKET_BYTES))
    if _MODE not in before:
        if own:
            os.environ[_TOKEN] = secrets.token_hex(32)
            os.environ.pop(_TOKEN_PATH, None)
        sources = os.environ.get(_TOKEN), os.environ.get(_TOKEN_PATH), (Path.home() / ".ray" / "auth_token").exists()
        os.environ[_MODE] = "token" if any(sources) else "disabled"
    forget()
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(before)
        forget()
