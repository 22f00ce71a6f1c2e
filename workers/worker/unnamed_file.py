"""A temporary file without a name: it goes with the last process that has it open, whatever ends that process.

agent  makes it, hands it to its worker at the start, reads it at the end        worker  writes it by its path
"""

from __future__ import annotations

import os
import tempfile
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from workers.files import no_temporary_file

__all__ = ["UnnamedFile"]


class UnnamedFile:
    """An empty file in ``$TMPDIR``, or PlanError. It can be an argument of a process that is being started."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            try:
                with tempfile.TemporaryFile() as file:
                    descriptor = os.dup(file.fileno())
            except OSError as error:
                raise no_temporary_file(error) from error
        self._descriptor = descriptor

    @property
    def path(self) -> Path:
        """Opens the file anew, from its beginning, in this process only."""
        return Path(f"/proc/self/fd/{self._descriptor}")

    def close(self) -> None:
        """Give up this process's hold of it."""
        os.close(self._descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._descriptor),)


def _received(handed: Any) -> UnnamedFile:
    return UnnamedFile(handed.detach())
