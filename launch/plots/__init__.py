"""Pictures of a benchmark, in the folder of its run: throughput, timeline, curves over an axis.

Drawn with matplotlib, an optional extra; nothing else imports it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from launch.bench.report import Report
from launch.show.console import Console

__all__ = ["INSTALL", "draw", "drawn"]

INSTALL = "pip install 'freewheel[plots]'"


def draw(report: Report, console: Console) -> list[Path]:
    """Draw whatever the report has data for, and say where; without matplotlib, say what to install.

    Returns:
        The PNG files, 1200 pixels wide, in the report's folder.
    """

    def draw_all() -> list[Path]:
        from launch.plots import pictures

        return pictures.draw_all(report)

    return drawn(draw_all, report.folder, console)


def drawn(drawing: Callable[[], list[Path]], folder: Path, console: Console) -> list[Path]:
    """Draw, and say in one line what was drawn, or why nothing was: no matplotlib, or a folder that takes no file."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it announces that it looks for fonts
    try:
        paths = drawing()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        console.extra("pictures", "not drawn, there is no matplotlib", INSTALL)
        return []
    except OSError as error:
        console.extra("pictures", "not drawn", f"cannot write them in {folder}: {error.strerror or error}")
        return []
    console.extra("pictures", ", ".join(path.name for path in paths), f"in {folder}")
    return paths
