"""The examples run as they stand, without arguments and without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert {"unet", "tagger", "simclr", "bert", "gpt2", "llama", "vit"} <= {path.stem for path in EXAMPLES}


@pytest.mark.processes
@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    text = example.read_text()
    if "from transformers" in text:
        pytest.importorskip("transformers", reason="the extra examples is not installed")
    command = [sys.executable, "-W", "error::FutureWarning", str(example)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "batches of" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model.safetensors").is_file()
