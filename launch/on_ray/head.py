"""The head node of a Ray cluster, as its users see it from outside: does it still take connections?

Training needs no head. But Ray ends every program and every actor that is connected to a cluster, without a word, once
the head has been gone for 60 s, and its own calls hang until then. So a run says before that why it ends.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Self

__all__ = ["RayHead", "connects"]

_CONNECT_WITHIN_S = 5.0
_REMEDY = "look whether the head node is up, and into gcs_server.out of its session; then start Ray and the run again"


def connects(address: str, within_s: float = _CONNECT_WITHIN_S) -> OSError | None:
    """Connect to HOST:PORT and hang up; why that could not be done, or None. Blocks at most ``within_s``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), within_s).close()
    except OSError as error:
        return error
    return None


class RayHead:
    """Looks after the head, from a thread, as long as it is entered; ``address``: of its control service (GCS)."""

    def __init__(self, address: str, look_every_s: float = 1.0, patience_s: float = 10.0) -> None:
        self._address, self._look_every_s, self._patience_s = address, look_every_s, patience_s
        self._silent: tuple[float, OSError] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-head-watch", daemon=True)

    def problem(self) -> str | None:
        """Why the run has to end, once the head was silent for too long. Does not block."""
        silent = self._silent
        if silent is None or (since_s := time.monotonic() - silent[0]) < self._patience_s:
            return None
        why = f"{self._said(silent[1])}, for {since_s:.0f} s now, and Ray ends whatever is connected to it after 60 s"
        return f"{why}: {_REMEDY}"

    def silent(self, within_s: float) -> str | None:
        """That it does not answer right now, if so. Blocks at most ``within_s``."""
        error = connects(self._address, within_s)
        return None if error is None else self._said(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(2 * _CONNECT_WITHIN_S)

    def look(self) -> None:
        """What the thread does. Blocks at most 5 s."""
        error = connects(self._address)
        if error is None:
            self._silent = None
        elif self._silent is None:
            self._silent = time.monotonic(), error

    def _watch(self) -> None:
        while not self._over.wait(self._look_every_s):
            self.look()

    def _said(self, error: OSError) -> str:
        return f"the Ray cluster's head at {self._address} does not answer ({error})"
