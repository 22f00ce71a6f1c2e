"""What a worker of another rank writes: files without a name, and tensors that need not be alone in their memory."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from workers.processes.context import process_context
from workers.worker.main import _apart
from workers.worker.unnamed_file import UnnamedFile


def write(file: UnnamedFile, connection: Connection) -> None:
    """Write into a file from another process."""
    file.path.write_bytes(b"from afar")
    connection.close()


@pytest.mark.processes
def test_an_unnamed_file_is_written_by_another_process_and_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = UnnamedFile()
    assert os.stat(file.path).st_dev == os.stat(tmp_path).st_dev
    assert list(tmp_path.iterdir()) == []
    context = process_context()
    mine, theirs = context.Pipe()
    process = context.Process(target=write, args=(file, theirs))
    process.start()
    theirs.close()
    assert mine.poll(60.0), "the other end is closed once it is written"
    process.join(10.0)
    assert file.path.read_bytes() == b"from afar"
    assert file.path.read_bytes() == b"from afar", "every reader begins at the beginning"
    path = file.path
    file.close()
    assert not path.exists()


def test_tensors_that_share_memory_are_written_apart_and_only_they_are_copied() -> None:
    whole, tied = torch.randn(3, 4, requires_grad=True), torch.randn(2, 2)
    tensors = {
        "whole": whole,
        "tied": tied,
        "tied too": tied,
        "part": torch.arange(6.0)[2:],
        "across": torch.randn(3, 2).t(),
        "channels last": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "none": torch.empty(0),
        "none either": torch.empty(0),
    }
    apart = _apart(tensors)
    read = load(save(apart))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
    copied = {name for name, tensor in tensors.items() if apart[name].data_ptr() != tensor.data_ptr()}
    assert copied == {"tied too", "part", "across", "channels last"}
