"""Pictures of a benchmark, in its run folder: throughput, timeline, and the curves of a comparison over an axis.

Drawn with matplotlib, an optional extra; nothing else imports it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from launch.console import Console
from launch.report import Report

__all__ = ["INSTALL", "draw"]

INSTALL = "pip install 'freewheel[plots]'"


def draw(report: Report, console: Console) -> list[Path]:
    """Draw whatever the report has data for, and say where; without matplotlib, say what to install.

    Args:
        report: of ``bench`` or ``bench_over``.
        console: told in one line.

    Returns:
        The PNG files, 1200 pixels wide, in the report's folder.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it announces that it looks for fonts
    try:
        from launch.plots.pictures import draw_all
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        console.extra("pictures", "not drawn, there is no matplotlib", INSTALL)
        return []
    paths = draw_all(report)
    console.extra("pictures", ", ".join(path.name for path in paths), f"in {report.folder}")
    return paths
