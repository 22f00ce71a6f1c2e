"""Ctrl-C at a safe point.

Python raises KeyboardInterrupt between any two bytecodes: in a finaliser or a callback it is printed and lost, while
workers are being ended it leaves some behind. So the signal is noted, and whoever is in charge looks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupts"]


class Interrupts:
    """Holds back the interrupts of the main thread while it is entered; elsewhere it does nothing.

    Only signals that have a handler in Python are held back: what is ignored stays ignored. The second signal goes to
    the handler that was there before, at once: for a program that does not come to look.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any]] = {}
        self._noted = False

    def noted(self) -> bool:
        """Whether a signal came since the last look."""
        noted, self._noted = self._noted, False
        return noted

    def raise_noted(self) -> None:
        """The safe point: raises ``KeyboardInterrupt`` where a signal came since the last look."""
        if self.noted():
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, raised: type[BaseException] | None, *rest: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if raised is None:
            self.raise_noted()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted, second = not self._noted, self._noted
        if second:
            self._before[signal.Signals(number)](number, frame)
