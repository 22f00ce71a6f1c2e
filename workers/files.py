"""Writing files: errors that name the file, which the system's own do not, and no name for what is half written.

with replacing(path) as draft:        with writing(path):
    draft.write_text(text)                file.write(line)        for what grows
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import PlanError
from pipeline.wording import escaped

__all__ = ["NotWritten", "no_temporary_file", "replacing", "write_json", "write_tensors", "write_text", "writing"]


class NotWritten(OSError):
    """A file could not be written; ``result``: a ``launch.Result``, where the training was over by then, else None."""

    def __init__(self, path: Path, why: str) -> None:
        place = f"a temporary file in {tempfile.gettempdir()} (TMPDIR)" if _has_no_name(path) else path
        super().__init__(f"cannot write {place}: {why}; make room there, or give another place")
        self.path = path
        self.result: Any = None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around nothing but writing this file: raises ``NotWritten`` where that fails."""
    try:
        yield
    except NotWritten:
        raise
    except (OSError, SafetensorError) as error:
        raise NotWritten(path, getattr(error, "strerror", None) or str(error)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name, and takes another one's place, once it is whole and on the disk.

    What is no file with a name, such as a pipe or /dev/stdout, is written as it is. A link stays one. Raises
    ``NotWritten`` where it failed; whatever had the name before has it still.
    """
    with writing(path):
        if path.exists() and (not path.is_file() or _has_no_name(path)):
            yield path
            return
        target = Path(os.path.realpath(path))
        draft = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            draft.touch()
            if target.exists():  # who made a file private meant it
                draft.chmod(target.stat().st_mode)
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write UTF-8, whole or not at all (``NotWritten``); what has no encoding is escaped."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(content: Any, path: Path, default: Callable[[Any], Any] | None = None) -> None:
    """Write plain values as a JSON file that any reader takes, as ``write_text``; ``default`` as of ``json.dumps``."""
    write_text(json.dumps(escaped(content), indent=2, default=default) + "\n", path)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, as ``write_text``, that others may read as what else is written: alone it is 0600."""
    with replacing(path) as draft:
        mode = draft.stat().st_mode
        save_file(tensors, draft)
        draft.chmod(mode)


def no_temporary_file(error: OSError) -> PlanError:
    """The error for a $TMPDIR that is not there, is full, or is not ours to write."""
    return PlanError(
        f"no temporary file can be made: {error.strerror or error}; set TMPDIR to a folder that is there, has room, "
        "and can be written."
    )


def _has_no_name(path: Path) -> bool:
    """Whether the file is one of ``workers.worker.unnamed_file``."""
    return str(path).startswith("/proc/self/fd/") and path.is_file() and not path.stat().st_nlink
