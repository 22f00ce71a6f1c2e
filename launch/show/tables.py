"""Tables on the console."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table

__all__ = ["print_table"]

_LEAST_WIDTH = 80


def print_table(console: Console, table: Table) -> None:
    """Print a table with all its figures: names fold, figures never, and lines that are then too long go on below."""
    options = console.options
    for column in table.columns:
        if column.no_wrap:
            cells = [column.header, *column.cells]
            column.min_width = max(Measurement.get(console, options, cell).maximum for cell in cells)
    needed = Measurement.get(console, options.update_width(1000), table).minimum
    wide = options.update_width(max(console.width, _LEAST_WIDTH, needed))
    console.print(Segments(console.render(table, wide)), soft_wrap=True, end="")
