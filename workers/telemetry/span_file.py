"""The file of a worker's spans: a .npy file that grows block by block, and that can be read at any time.

    | header: so many records | block | block | ...       a block is there before the header counts it

So a worker that is killed leaves all that it had written.
"""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from pipeline.metrics.spans import SPAN_DTYPE
from workers.files import NotWritten, writing

__all__ = ["SpanFile"]


class SpanFile:
    """One file of SPAN_DTYPE, whose folder is made. The first error ends the writing, and ``close`` raises it."""

    def __init__(self, path: Path) -> None:
        self._path, self._records = path, 0
        self._failed: NotWritten | None = None
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
            self._write_header()

    def append(self, numbers: array[int], count: int) -> None:
        """Write the first ``count`` of these numbers, whole records. Blocks until the system has taken them."""
        if self._failed is not None:
            return
        try:
            with writing(self._path):
                self._file.seek(0, 2)
                records = np.asarray(numbers)[:count].astype("<i8", copy=False).view(SPAN_DTYPE)
                self._file.write(records.data.cast("B"))
                self._file.flush()
                self._records += len(records)
                self._write_header()
        except NotWritten as error:
            self._failed = error

    def close(self) -> None:
        """No more comes; raises ``NotWritten`` where not everything could be written."""
        try:
            with writing(self._path):
                self._file.close()
        finally:
            if self._failed is not None:
                raise self._failed

    def _write_header(self) -> None:
        """numpy leaves room in it for a longer number, so that it is of the same length each time."""
        self._file.seek(0)
        shape = {"descr": np.lib.format.dtype_to_descr(SPAN_DTYPE), "fortran_order": False, "shape": (self._records,)}
        np.lib.format.write_array_header_1_0(self._file, shape)
        self._file.flush()
