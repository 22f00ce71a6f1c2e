"""Tables on the console."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from launch.show.tables import print_table


@pytest.mark.parametrize("width", [20, 60, 80, 120])
def test_no_figure_is_lost_in_a_narrow_terminal(width: int) -> None:
    shown = io.StringIO()
    table = Table(box=None)
    table.add_column("mode", overflow="fold")
    for index in range(7):
        table.add_column(f"figure {index}", justify="right", no_wrap=True)
    table.add_row("one process", *(f"{1234.5 + index:.2f}" for index in range(7)))
    print_table(Console(file=shown, width=width), table)
    lines = [line.split() for line in shown.getvalue().splitlines()]
    assert [line[-7:] for line in lines[1:2]] == [[f"{1234.5 + index:.2f}" for index in range(7)]]
    assert " ".join(word for line in lines[1:] for word in line if word in ("one", "process")) == "one process"
