"""Files that cannot be written, on a full disk most of all: the error names the file, which the system's own does not.

with writing(path):
    path.write_text(text)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = ["NotWritten", "writing"]


class NotWritten(OSError):
    """A file could not be written.

    Attributes:
        path: which.
        result: what came out, where the training was over by then (``launch.Result``); else None.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"cannot write {path}: {why}; make room there, or give another place")
        self.path = path
        self.result: Any = None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Nothing but writing this file belongs inside.

    Raises:
        NotWritten: it failed.
    """
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        raise NotWritten(path, error.strerror or str(error)) from error
    except SafetensorError as error:
        raise NotWritten(path, str(error)) from error
