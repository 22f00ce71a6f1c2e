"""A worker's bell: whoever changes something the worker waits for rings it.

A worker has several channels and sleeps on one thing only, its bell:

    while True:
        bell.clear()                      first clear, then look: what comes after the look rings again
        if not (poll everything):
            bell.wait(timeout_s)
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Self

import posix_ipc

__all__ = ["POLL_S", "SPIN_S", "WakeUp", "acquire_within", "create_semaphore", "open_semaphore", "unlink_semaphore"]

# A sleeping core of a virtual machine takes 60 to 90 us to wake, as long as three hops; one that looks does not sleep.
SPIN_S = 100e-6
POLL_S = 0.002  # nothing can wait for a name to appear, so it is looked for


class WakeUp:
    """A named counting semaphore: one process waits, any that knows the name rings. Use `create` and `attach`.

    ``spin_s``: seconds in which a wait looks before it sleeps. 0 where threads of this very process ring: whoever looks
    holds the interpreter's lock that they need.
    """

    def __init__(self, name: str, semaphore: Any, spin_s: float = SPIN_S) -> None:
        self.name, self._semaphore, self._spin_s, self._open = name, semaphore, spin_s, True

    @classmethod
    def create(cls, name: str) -> Self:
        """Make a new bell; raises ``FileExistsError`` when the name is taken."""
        return cls(name, create_semaphore(name, 0))

    @classmethod
    def attach(cls, name: str, deadline_s: float, spin_s: float = SPIN_S) -> Self:
        """Open a bell that another process makes; raises ``TimeoutError`` if it is not there in ``deadline_s`` s."""
        return cls(name, open_semaphore(name, deadline_s), spin_s)

    def ring(self) -> None:
        """Wake the waiter, now or at its next `wait`. Never blocks; does nothing once closed here."""
        if self._open:
            self._semaphore.release()

    def clear(self) -> None:
        """Forget all rings so far. Never blocks."""
        while self._semaphore.value and acquire_within(self._semaphore, 0):
            pass

    def wait(self, timeout_s: float) -> bool:
        """Use up one ring; False when nobody rang within ``timeout_s`` seconds."""
        return acquire_within(self._semaphore, timeout_s, self._spin_s)

    def close(self) -> None:
        """Give up this process's handle; a second call does nothing."""
        if self._open:
            self._open = False
            self._semaphore.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def create_semaphore(name: str, value: int) -> Any:
    """A new named counting semaphore; FileExistsError when the name is taken."""
    try:
        return posix_ipc.Semaphore(f"/{name}", posix_ipc.O_CREX, initial_value=value)
    except posix_ipc.ExistentialError as error:
        raise FileExistsError(f"semaphore '{name}' exists already") from error


def open_semaphore(name: str, deadline_s: float) -> Any:
    """Open a named semaphore, waiting at most ``deadline_s`` seconds for it to appear; else TimeoutError."""
    end = time.monotonic() + deadline_s
    while True:
        try:
            return posix_ipc.Semaphore(f"/{name}")
        except posix_ipc.ExistentialError as error:
            if time.monotonic() >= end:
                raise TimeoutError(
                    f"no semaphore '{name}' after {deadline_s:.3g} s: was it made, and not yet unlinked?"
                ) from error
        time.sleep(POLL_S)


def unlink_semaphore(name: str) -> None:
    """Remove a semaphore's name; who has it open goes on. One already removed is no error."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_semaphore(f"/{name}")


def acquire_within(semaphore: Any, timeout_s: float, spin_s: float = SPIN_S) -> bool:
    """Take one from a semaphore; False when ``timeout_s`` seconds passed without one.

    After a signal's Python handler the wait goes on for the rest of the time, unless the handler raised (Ctrl-C).
    """
    if _taken_soon(semaphore, min(timeout_s, spin_s)):
        return True
    end = time.monotonic() + timeout_s
    while True:
        try:
            semaphore.acquire(max(end - time.monotonic(), 0))
            return True
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            # Busy can come early: the system call counts on the wall clock, which may be set.
            if time.monotonic() >= end:
                return False


def _taken_soon(semaphore: Any, spin_s: float) -> bool:
    """Look again and again for a moment before going to sleep; others may run meanwhile."""
    end = time.perf_counter() + spin_s
    while True:
        if semaphore.value:
            try:
                semaphore.acquire(0)
                return True
            except posix_ipc.BusyError:
                pass  # somebody else was faster
        if time.perf_counter() >= end:
            return False
        os.sched_yield()
