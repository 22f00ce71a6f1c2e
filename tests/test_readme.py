"""What the README shows works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import check_plan

ROOT = Path(__file__).parents[1]


def _blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    parts = re.split(r"^```(\w*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    fences = list(zip(parts[1::2], parts[2::2], strict=True))  # every second fence closes a block
    return [body.lstrip("\n") for name, body in fences[::2] if name == language]


@pytest.mark.processes
def test_the_ten_lines_of_python_run(tmp_path: Path) -> None:
    (code,) = _blocks("python")
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "unlocked, 2 stages, 500 batches of 128" in done.stdout
    assert (tmp_path / "model.safetensors").is_file()


def test_every_command_shown_is_one_that_parses() -> None:
    """The recipes and options of every ``freewheel`` line exist; nothing is run, so no optional package is needed."""
    from launch.options import BenchOptions, parse
    from launch.ray_options import TrainOptions
    from launch.sweep.axes import read_axes
    from launch.sweep.options import SweepOptions

    lines = [line.partition("#")[0].split() for block in _blocks("") for line in block.splitlines()]
    commands = [
        line[1:] for line in lines if line[:1] == ["freewheel"] and line[2:3] not in (["channel"], ["my_recipe.py"])
    ]
    assert len(commands) >= 5
    for command, recipe, *options in commands:
        kind = {"bench": BenchOptions, "sweep": SweepOptions}.get(command, TrainOptions)
        parsed = parse(recipe, options, kind, "freewheel")
        check_plan(parsed.plan)
        if isinstance(parsed.run, SweepOptions):
            assert read_axes(recipe, parsed, parsed.run.vary)
