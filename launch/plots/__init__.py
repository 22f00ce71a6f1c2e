"""Pictures of a benchmark, in the folder of its run. Drawn with matplotlib, an extra that nothing else imports."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from launch.bench.report import Report
from launch.bench.scaling import ScalingReport
from launch.show.console import Console

__all__ = ["INSTALL", "draw", "drawn"]

INSTALL = "pip install 'freewheel[plots]'"


def draw(report: Report, console: Console) -> list[Path]:
    """Draw what the report has data for into its folder, and say where; without matplotlib, say what to install.

    Returns:
        throughput.png; timeline.png when one of our own modes ran; latency.png or link.png of a sweep. 1200 px wide.
    """

    def draw_all() -> list[Path]:
        from launch.plots.curves import draw_curves
        from launch.plots.throughput import draw_throughput
        from launch.plots.timeline import draw_timeline, shown_rows

        paths = [draw_throughput(report, report.folder / "throughput.png")]
        if shown_rows(report):
            paths.append(draw_timeline(report, report.folder / "timeline.png"))
        if isinstance(report, ScalingReport):
            paths.append(draw_curves(report, report.folder / report.axis.picture))
        return paths

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
