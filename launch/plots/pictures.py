"""All pictures of a report."""

from __future__ import annotations

from pathlib import Path

from launch.bench.report import Report
from launch.bench.scaling import ScalingReport
from launch.plots.curves import draw_curves
from launch.plots.throughput import draw_throughput
from launch.plots.timeline import draw_timeline, shown_rows

__all__ = ["draw_all"]


def draw_all(report: Report) -> list[Path]:
    """Draw what there is data for, into the report's folder.

    Returns:
        throughput.png; timeline.png when one of our own modes ran; latency.png or link.png of a sweep.
    """
    paths = [draw_throughput(report, report.folder / "throughput.png")]
    if shown_rows(report):
        paths.append(draw_timeline(report, report.folder / "timeline.png"))
    if isinstance(report, ScalingReport):
        paths.append(draw_curves(report, report.folder / report.axis.picture))
    return paths
