"""Pictures, in the folder of a run: of a benchmark (throughput, timeline, curves over an axis) and of a sweep.

Drawn with matplotlib, an optional extra; nothing else imports it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.bench.report import Report
from launch.show.console import Console
from launch.sweep.findings import Finding
from launch.sweep.grid import Grid

__all__ = ["INSTALL", "draw", "draw_sweep"]

INSTALL = "pip install 'freewheel[plots]'"


def draw(report: Report, console: Console) -> list[Path]:
    """Draw whatever the report has data for, and say where; without matplotlib, say what to install.

    Args:
        report: of ``bench`` or ``bench_over``.
        console: told in one line.

    Returns:
        The PNG files, 1200 pixels wide, in the report's folder.
    """

    def draw_all() -> list[Path]:
        from launch.plots import pictures

        return pictures.draw_all(report)

    return _drawn(draw_all, report.folder, console)


def draw_sweep(grid: Grid, findings: Sequence[Finding], verdict: str, folder: Path, console: Console) -> list[Path]:
    """Draw picture.png, and say where; without matplotlib, say what to install.

    Args:
        grid: what was asked for.
        findings: what came of it.
        verdict: its first sentence is the title.
        folder: of the sweep.
        console: told in one line.
    """

    def draw_one() -> list[Path]:
        from launch.sweep import picture

        return [picture.draw_grid(grid, findings, verdict, folder / "sweep.png")]

    return _drawn(draw_one, folder, console)


def _drawn(drawing: Callable[[], list[Path]], folder: Path, console: Console) -> list[Path]:
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
