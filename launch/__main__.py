"""The command: ``freewheel``, or ``python -m freewheel``. What takes seconds to import comes last.

before and while it is imported    Ctrl-C and SIGTERM end the program at once: nothing was started
from then on                       they are KeyboardInterrupt; ``launch.cli`` stops all workers
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit; status as in ``launch.cli``."""
    both = signal.SIGINT, signal.SIGTERM
    held = {number: handler for number in both if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in held:
        signal.signal(number, _leave)
    # An exception raised between any two lines of an import may be swallowed there, or come out as another one.
    try:
        import freewheel  # noqa: F401  # from here on our packages are found before a user's files of their names
    except ImportError as error:
        print(f"freewheel: {error}", file=sys.stderr)
        sys.exit(2)
    from launch.cli import run_command as command

    try:
        for number, handler in held.items():
            signal.signal(number, handler)
        command()
    except KeyboardInterrupt:
        _say()
        sys.exit(_INTERRUPTED)


def _leave(number: int, frame: FrameType | None) -> None:
    _say()
    os._exit(_INTERRUPTED)


def _say() -> None:
    """One line; under torchrun one rank speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"freewheel: interrupted; nothing is running\n")


if __name__ == "__main__":
    main()
