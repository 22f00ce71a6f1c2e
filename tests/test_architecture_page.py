"""docs/architecture.md names the rooms, files and functions that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_rooms import LAYERS, ROOMS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
STEPS = re.findall(r"^\|.*\| `([\w/]+\.py)` \| (.*) \|$", PAGE, flags=re.MULTILINE)
"""File and functions of every step of the two walks."""


def _defined(path: Path) -> set[str]:
    """Functions and classes of a file, and methods as ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_room_has_its_line_in_the_order_of_the_rooms() -> None:
    rooms = [room for room in ROOMS if room not in LAYERS and not room.endswith("__main__")]
    listed = re.findall(r"^\| `((?:pipeline|workers|launch)\.[\w.]+)` \|", PAGE, flags=re.MULTILINE)
    assert listed == rooms


@pytest.mark.parametrize(("file", "names"), STEPS)
def test_every_step_of_a_walk_is_where_the_page_says(file: str, names: str) -> None:
    defined = _defined(ROOT / file)
    assert (listed := re.findall(r"`([\w.]+)`", names))
    assert set(listed) <= defined


def test_every_file_that_is_named_exists() -> None:
    assert len(STEPS) > 15
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", PAGE))
    assert [file for file in sorted(named) if not (ROOT / file).exists()] == []
