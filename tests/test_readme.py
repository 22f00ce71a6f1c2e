"""What the README shows works as it stands there, and so do the commands of the other pages."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import check_plan

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))]


def _blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    parts = re.split(r"^```(\w*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    fences = list(zip(parts[1::2], parts[2::2], strict=True))  # every second fence closes a block
    return [body.lstrip("\n") for name, body in fences[::2] if name == language]


def _commands(page: str) -> list[list[str]]:
    """What follows ``freewheel`` on a line of its own, or on several that end in a backslash."""
    whole = [line for block in _blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    lines = [shlex.split(line, comments=True) for line in whole if line.startswith("freewheel ")]
    return [line[1:] for line in lines if line[2] not in ("channel", "my_recipe.py")]


def _anchors(page: Path) -> set[str]:
    """What a link may name in a page: its headings, as they are written in addresses."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _links(page: str) -> list[tuple[Path, str]]:
    """The pages of the project, and the headings in them, that a page links to or names in backticks."""
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    linked = [
        (folder / place if place else ROOT / page, anchor)
        for place, _, anchor in (target.partition("#") for target in re.findall(r"\]\(([^)\s]+)\)", text))
        if "://" not in place
    ]
    named = re.findall(r"`([\w/.-]+\.md)`", text)
    return linked + [(ROOT / name if (ROOT / name).exists() else folder / name, "") for name in named]


@pytest.mark.parametrize("page", PAGES)
def test_every_page_and_heading_that_is_linked_exists(page: str) -> None:
    for place, anchor in _links(page):
        assert place.exists(), f"{page} names {place}"
        assert not anchor or anchor in _anchors(place), f"{page} links to {place}#{anchor}"


def test_the_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.processes
def test_the_ten_lines_of_python_run(tmp_path: Path) -> None:
    (code,) = _blocks("README.md", "python")
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "unlocked, 2 stages, 500 batches of 128" in done.stdout
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_shown_is_one_that_parses(page: str) -> None:
    """The recipes and options of every ``freewheel`` line exist; nothing is run, so no optional package is needed."""
    from launch.options.options import BenchOptions, parse
    from launch.options.ray_options import TrainOptions
    from launch.sweep.axes import read_axes, read_rows
    from launch.sweep.options import SweepOptions, with_preset

    commands = _commands(page)
    assert len(commands) >= {"README.md": 5, "docs/guide.md": 5, "docs/benchmarks.md": 5, "docs/convergence.md": 5}.get(
        page, 0
    )
    for command, recipe, *typed in commands:
        options = with_preset(typed)
        kind = {"bench": BenchOptions, "sweep": SweepOptions}.get(command, TrainOptions)
        parsed = parse(recipe, options, kind, "freewheel")
        check_plan(parsed.plan)
        if isinstance(parsed.run, SweepOptions):
            axes = read_axes(recipe, parsed, parsed.run.vary)
            rows = read_rows(recipe, options, parsed.run.row, axes)
            assert axes or rows
