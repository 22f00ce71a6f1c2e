"""Tables on the console."""

from __future__ import annotations

from rich.console import Console
from rich.segment import Segments
from rich.table import Table

__all__ = ["print_table"]

_LEAST_WIDTH = 80


def print_table(console: Console, table: Table) -> None:
    """Print a table with all its figures: in a terminal of less than 80 columns its lines go on in the next one."""
    options = console.options.update_width(max(console.width, _LEAST_WIDTH))
    console.print(Segments(console.render(table, options)), soft_wrap=True, end="")
