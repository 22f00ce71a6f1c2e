"""A rank's end of its connection to the driver: what every rank answers by itself, and how its part ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from workers.clock import now_ns
from workers.supervision import control_records as control
from workers.supervision.control_socket import ControlSocket, Gone, wait_for

__all__ = ["DriverConnection", "DriverGone", "Stopped"]

_STOP_WITHIN_S = 8.0  # torchrun kills what is there 30 s after its SIGTERM


class DriverGone(ConnectionError):
    """The driver hung up, or said nothing for too long, before the run was over.

    ``told``: whether the run had begun here; else the driver has said on its own console what was wrong.
    """

    def __init__(self, why: str, told: bool) -> None:
        super().__init__(f"the driver (rank 0) is gone ({why}); the worker of this rank was stopped")
        self.told = told


class Stopped(Exception):
    """The driver ends the run."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class DriverConnection:
    """A rank's end; ``asked``: whether somebody asked this process to end (SIGINT, SIGTERM)."""

    def __init__(self, wire: ControlSocket, asked: Callable[[], bool]) -> None:
        self.begun = False  # the run, here
        self._wire, self._asked = wire, asked
        self._interrupted_at: float | None = None
        self.send = wire.send

    def take_part(self, life: Callable[[], object], end: Callable[[], None]) -> int:
        """Live until the driver stops the run; gives its exit status, or raises DriverGone.

        ``life`` ends with what `hear` raises; ``end`` ends all that runs here and removes what was made.
        """
        try:
            life()
        except Stopped as stopped:
            end()
            self._farewell()
            return stopped.status
        except Gone as gone:
            raise DriverGone(str(gone), self.begun) from gone
        finally:
            end()
        raise AssertionError("a rank ends when it is told to")

    def hear(self, patience_s: float, *also: object) -> list[control.Control]:
        """What the driver says; tells it the time, and that this process was asked to end. Blocks 0.2 s at most.

        The driver may be silent for ``patience_s``, while this is called often; ``also``: what else to wait for.
        """
        wait_for(self._wire, *also)
        heard = self._wire.drain()
        for record in heard:
            if isinstance(record, control.Stop):
                raise Stopped(record.status)
            if isinstance(record, control.ReadClock):
                self.send(control.Time(now_ns()))
        if self._wire.silent_s() > patience_s:
            raise Gone(f"no word from it for {patience_s:.0f} s")
        if self._asked():
            if self._interrupted_at is None:
                self._interrupted_at = time.monotonic()
                self.send(control.Interrupted())
            elif time.monotonic() - self._interrupted_at > _STOP_WITHIN_S:
                raise Gone(f"no answer to an interrupt within {_STOP_WITHIN_S:.0f} s")
        return heard

    def _farewell(self) -> None:
        """Say that all is cleaned up, and wait until the driver hangs up, once it has reported; at most 8 s."""
        end = time.monotonic() + _STOP_WITHIN_S
        with contextlib.suppress(Gone):
            self.send(control.AgentStopped())
            while time.monotonic() < end:
                wait_for(self._wire)
                self._wire.drain()
