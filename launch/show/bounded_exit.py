"""Tidying up with a library whose other side may be gone: no call may keep the program from ending."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing import util
from typing import NoReturn

__all__ = ["leave", "tidied"]

_out = threading.Event()  # some call has not come back


def tidied(within_s: float, call: Callable[[], object]) -> bool:
    """Make a call that only tidies up, whatever it raises; gives whether it came back within ``within_s`` seconds.

    It is not made, and the answer is no, if an earlier one has not come back.
    """
    back = threading.Event()

    def make() -> None:
        with contextlib.suppress(Exception):
            call()
        back.set()

    if not _out.is_set():
        threading.Thread(target=make, name="tidying up", daemon=True).start()
        if not back.wait(within_s):
            _out.set()
    return back.is_set()


def leave(status: int) -> NoReturn:
    """End the program with an exit status; where a call is still out, without what its library wants to do at exit."""
    if _out.is_set():
        util._exit_function()  # type: ignore[attr-defined]  # removes multiprocessing's own files
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
