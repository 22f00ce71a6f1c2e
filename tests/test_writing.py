"""A full disk: one line that names the file, whatever was found out before is still said. /dev/full plays the disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import problems
import pytest
import torch
from safetensors.torch import save_file

from launch import RunFailed
from launch.results import run_folder
from launch.results.result import Result
from launch.show.console import Console
from launch.training import Launcher, Working, run
from pipeline import Plan, Recipe
from pipeline.run.resolve import resolve
from pipeline.run.resolved import Resolved
from workers.files import NotWritten, replacing, write_json, write_text, writing
from workers.telemetry import records
from workers.worker.unnamed_file import UnnamedFile

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


def _run(tmp_path: Path, working: Callable[..., Any]) -> Result:
    recipe = problems.recipe()
    resolved = resolve(recipe, Plan(stages=1, mode="naive", steps=4, spans=False))
    console, launcher = Console(quiet=True), Launcher("test", contextlib.contextmanager(working))
    return run(lambda: recipe, resolved, tmp_path, "r", console, [], launcher)


def _trains(source: Callable[[], Recipe], resolved: Resolved, run_dir: Path) -> Iterator[Working]:
    """A worker that has trained four batches and left its part of the weights."""
    (run_dir / "parts").mkdir()
    for what in ("model", "optimizer"):
        save_file({"0": torch.zeros(3)}, run_dir / "parts" / f"{what}-0.safetensors")
    told: list[records.Record] = [
        records.Loss(0, [4.0, 3.0, 2.0, 1.0], 5),
        records.Finished(0, 4, 0, 0, 1, 1, 9, (2, 9)),
    ]
    yield iter(told), lambda: None


@pytest.mark.parametrize(
    "write", [lambda path: path.write_text("x"), lambda path: np.save(path.open("wb"), np.ones(3))]
)
def test_a_file_that_cannot_be_written_is_named(write: Callable[[Path], Any]) -> None:
    sentence = r"^cannot write /dev/full: .+; make room there, or give another place$"
    with pytest.raises(NotWritten, match=sentence), writing(FULL):
        write(FULL)


def test_a_failure_that_cannot_be_written_down_is_still_the_failure(tmp_path: Path) -> None:
    """It was hidden by the OSError of failure.txt."""

    def fails(source: Callable[[], Recipe], resolved: Resolved, run_dir: Path) -> Iterator[Working]:
        (run_dir / "failure.txt").symlink_to(FULL)
        raise RunFailed("stage 0: as planned", stage=0, details="where\n")
        yield iter(()), lambda: None

    with pytest.raises(RunFailed, match=r"^stage 0: as planned$") as caught:
        _run(tmp_path, fails)
    assert caught.value.shown.startswith("where\n(cannot write /")
    assert "failure.txt: No space left on device" in caught.value.shown


@pytest.mark.parametrize("file", ["plan.json", "metrics.jsonl", "result.json"])
def test_every_file_of_a_run_is_named_and_what_was_trained_is_not_lost(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(runs: Path, name: str) -> Path:
        (runs / name).mkdir()
        (runs / name / file).symlink_to(FULL)
        return runs / name

    monkeypatch.setattr(run_folder, "new_run_dir", full)
    with pytest.raises(NotWritten, match=f"^cannot write {tmp_path}/r/{file}: No space left on device; ") as caught:
        _run(tmp_path, _trains)
    assert (caught.value.result is None) == (file != "result.json")
    if caught.value.result is not None:
        assert caught.value.result.losses == [4.0, 3.0, 2.0, 1.0]
        assert "4 batches of 16: loss 1.0000" in caught.value.result.summary()
        assert repr(caught.value.result) == f"Result({caught.value.result.summary()})"


def _write_half(path: Path) -> None:
    with replacing(path) as draft:
        draft.write_text("half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_whole_or_is_not_there(tmp_path: Path) -> None:
    """A full disk left half a file under the name of a whole one."""
    path = tmp_path / "result.json"
    for before in (None, "the one before"):
        if before is not None:
            path.write_text(before)
        with pytest.raises(NotWritten, match=f"^cannot write {path}: No space left"):
            _write_half(path)
        assert [entry.read_text() for entry in tmp_path.iterdir()] == ([] if before is None else [before])
    write_json({"a": 1}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one_and_what_is_no_file_is_written_as_it_is(tmp_path: Path) -> None:
    """--json /dev/stdout, and a link to the latest result."""
    link, file, pipe = tmp_path / "latest", tmp_path / "file", tmp_path / "pipe"
    link.symlink_to(file)
    write_text("a", link)
    assert (link.is_symlink(), file.read_text()) == (True, "a")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text("b", pipe)
    assert (os.read(reader, 9), pipe.is_fifo()) == (b"b", True)
    os.close(reader)
    file = UnnamedFile()
    write_text("c", file.path)
    assert file.path.read_text() == "c"
    file.close()


def test_a_full_temporary_folder_is_called_that() -> None:
    """The error named /proc/self/fd/7."""
    with contextlib.closing(UnnamedFile()) as file:
        assert str(NotWritten(file.path, "it is full")) == (
            f"cannot write a temporary file in {tempfile.gettempdir()} (TMPDIR): it is full; make room there, or give "
            "another place"
        )


def test_weights_may_be_read_by_whoever_may_read_the_rest_of_a_run(tmp_path: Path) -> None:
    """They were 0600: a colleague could read the losses of a run in a shared folder and not its weights."""
    result = _run(tmp_path, _trains)
    exported = result.export(tmp_path / "weights.safetensors")
    written = [exported, *(result.run_dir / f"{name}.safetensors" for name in ("model", "optimizer"))]
    assert {path.stat().st_mode for path in written} == {(result.run_dir / "result.json").stat().st_mode}
    exported.chmod(0o640)
    assert result.export(exported).stat().st_mode & 0o777 == 0o640, "who made a file private meant it"
