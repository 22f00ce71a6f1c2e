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
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["NotWritten", "write_tensors", "writing"]


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


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read where they may read what else is written: it is 0600 by itself.

    Raises:
        NotWritten: it failed.
    """
    with writing(path):
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path)
        path.chmod(mode)
