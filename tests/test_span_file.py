"""The spans of a worker lie in their file while it works, and take two blocks of memory, however long the run is."""

from __future__ import annotations

import contextlib
import threading
import tracemalloc
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launch.results.run_folder import read_spans
from pipeline.metrics.spans import SPAN_DTYPE, Span
from workers.channels.shm.ring import new_prefix
from workers.files import NotWritten
from workers.telemetry.span_file import SpanFile
from workers.telemetry.span_recorder import FIELDS, SpanRecorder
from workers.telemetry.status_table import StatusTable

BLOCK = 1 << 14


@pytest.fixture
def board() -> Iterator[StatusTable]:
    """A board of one worker."""
    name = f"{new_prefix()}-s"
    with contextlib.closing(StatusTable(name, 1, create=True)) as made:
        StatusTable.unlink_name(name)
        yield made


def test_what_is_recorded_is_what_is_read(board: StatusTable, tmp_path: Path) -> None:
    record = SpanRecorder(0, board, tmp_path / "spans" / "stage-0.npy")
    record.depth = lambda: 3
    for batch in range(3 * BLOCK + 7):
        record(Span.FORWARD if batch % 2 else Span.STEP, batch)
    record.close()
    records = np.load(tmp_path / "spans" / "stage-0.npy", allow_pickle=False)
    assert records.dtype == SPAN_DTYPE
    assert records["batch"].tolist() == [*range(3 * BLOCK + 7), -1]
    assert records["span"][:2].tolist() == [Span.STEP, Span.FORWARD]
    assert records["queue"][:2].tolist() == [-1, 3]
    assert (np.diff(records["start_ns"]) >= 0).all()
    (spans,) = read_spans(tmp_path)
    assert len(spans) == 3 * BLOCK + 7


def test_a_worker_that_is_killed_leaves_what_it_had_written(board: StatusTable, tmp_path: Path) -> None:
    """All of it was in memory until the end: a run that was killed left nothing to look at."""
    path = tmp_path / "spans" / "stage-0.npy"
    record = SpanRecorder(0, board, path)
    assert len(np.load(path, allow_pickle=False)) == 0
    assert len(read_spans(tmp_path)[0]) == 0
    for batch in range(2 * BLOCK + 5):
        record(Span.STEP, batch)
    assert record._writing is not None
    record._writing.result(30.0)
    assert np.load(path, allow_pickle=False)["batch"].tolist() == list(range(2 * BLOCK))
    record.close()


def test_a_long_run_takes_no_more_memory_than_a_short_one(board: StatusTable, tmp_path: Path) -> None:
    """32 bytes a record: an hour at 50,000 records a second was 5.8 GB."""
    record = SpanRecorder(0, board, tmp_path / "spans.npy")
    record(Span.STEP, 0)
    tracemalloc.start()
    try:
        for batch in range(3 * BLOCK):
            record(Span.STEP, batch)
        record.close()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * BLOCK * FIELDS * 8


def test_the_worker_waits_for_a_file_that_is_slower_than_itself(
    board: StatusTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks: one that is written, one that is filled; nothing in one is overwritten before it is written."""
    slow, write = threading.Event(), SpanFile.append

    def append(self: SpanFile, numbers: array[int], count: int) -> None:
        assert slow.wait(30.0)
        write(self, numbers, count)

    monkeypatch.setattr(SpanFile, "append", append)
    record = SpanRecorder(0, board, tmp_path / "spans.npy")
    for batch in range(2 * BLOCK - 1):
        record(Span.STEP, batch)
    slow.set()
    for batch in range(2 * BLOCK - 1, 5 * BLOCK):
        record(Span.STEP, batch)
    record.close()
    assert np.load(tmp_path / "spans.npy", allow_pickle=False)["batch"].tolist() == [*range(5 * BLOCK), -1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_told_at_the_end_of_the_run(tmp_path: Path) -> None:
    """The batches go on; what could be written stays."""
    file = SpanFile(tmp_path / "spans.npy")
    file.append(array("q", range(2 * FIELDS)), 2 * FIELDS)
    good = file._file
    with Path("/dev/full").open("wb") as full:
        file._file = full
        file.append(array("q", range(FIELDS)), FIELDS)
        file._file = good
        with contextlib.suppress(OSError):
            full.close()
    file.append(array("q", range(FIELDS)), FIELDS)
    with pytest.raises(NotWritten, match=f"^cannot write {tmp_path}/spans.npy: No space left"):
        file.close()
    assert len(np.load(tmp_path / "spans.npy", allow_pickle=False)) == 2
