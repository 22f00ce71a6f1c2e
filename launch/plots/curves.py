"""Curves over an axis, each named at its end: latency.png and link.png of a benchmark, sweep.png of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from launch.bench.report import BenchRow
from launch.bench.scaling import ScalingReport, mode_name
from launch.bench.spread import Spread
from launch.plots import style
from launch.plots.words import curves_title, subtitle

__all__ = ["BELOW_PX", "TOP_PX", "WIDE", "Curve", "Look", "apart", "curves_of", "draw_curves", "draw_panel"]

WIDE = 20.0
"""Largest over smallest value from which an axis is logarithmic."""
TOP_PX = 50  # above the axes
BELOW_PX = 90
_WIDTH_PX, _HEIGHT_PX, _LEFTS_PX = 400, 420, (90, 660)
_LABEL_PX = 22  # least distance of two labels


@dataclass(frozen=True)
class Curve:
    """One row over the axis.

    Attributes:
        kind: ``unlocked``, ``backprop`` or empty.
        at: places on the axis with a figure, ``middle``, in a band from ``low`` to ``high``.
        lost: places without a figure, as what was run there diverged.
    """

    name: str
    kind: str
    at: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    lost: tuple[float, ...] = ()


@dataclass(frozen=True)
class Look:
    """How a curve is drawn, and its name written."""

    colour: str
    ink: str
    width: float = 1.8
    line: str = "-"
    weight: str = "normal"


def curves_of(sweep: ScalingReport, what: str) -> list[Curve]:
    """The curves of a panel.

    ``what`` is ``latency``, of stage 0 in ms, p50 with a band up to p99; or ``throughput`` in samples per second, the
    median of the rounds with a band from the slowest to the fastest.
    """
    keyed: dict[tuple[str, str, int], list[tuple[float, BenchRow, tuple[float, float, float]]]] = {}
    for value, report in sweep.points:
        for row in report.rows:
            if (figure := _PANELS[what][1](row)) is not None:
                c = row.contender
                keyed.setdefault((c.engine, c.mode, c.threads), []).append((value, row, figure))
    curves = []
    for found in keyed.values():
        at, rows, figures = zip(*found, strict=True)
        kind = "unlocked" if rows[0].contender.mode == "unlocked" else ""
        curves.append(Curve(mode_name(rows[0]), kind, at, *zip(*figures, strict=True)))
    return curves


def draw_curves(sweep: ScalingReport, path: Path) -> Path:
    """Update latency on the left, throughput on the right, one line per row, named at its end."""
    headline = style.Headline(curves_title(sweep), subtitle(sweep, over=sweep.axis.name), sweep.emulated)
    figure = style.new_figure(headline, TOP_PX + _HEIGHT_PX + BELOW_PX)
    ours = Look(style.ACCENT, style.ACCENT, 2.2, weight="bold")
    for left, (what, (heading, _)) in zip(_LEFTS_PX, _PANELS.items(), strict=True):
        axes = style.axes_at(figure, left, headline.height_px + TOP_PX, _WIDTH_PX, _HEIGHT_PX)
        style.name_across(axes, sweep.axis.label)
        if sweep.axis.name == "stages":
            axes.set_xscale("log", base=2)
        values = [value for value, _ in sweep.points]
        axes.set_xticks(values, [f"{value:g}" for value in values])
        curves = curves_of(sweep, what)
        looks = [ours if curve.kind == "unlocked" else Look(style.MUTED, style.INK, 1.4) for curve in curves]
        draw_panel(axes, heading, curves, looks)
    return style.save(figure, path)


def draw_panel(
    axes: Axes, heading: str, curves: Sequence[Curve], looks: Sequence[Look], wide: float = WIDE, *, zero: bool = True
) -> None:
    """Draw the curves with their bands, and a cross at the upper edge for what was lost.

    The axis is logarithmic from ``wide``, largest over smallest value, on; else it begins at 0 where ``zero``.
    """
    style.write(axes, 0, 1.04, heading, color=style.INK, fontweight="bold")
    axes.grid(axis="y", color=style.FAINT, linewidth=0.8)
    low = min((min(curve.low) for curve in curves if curve.low), default=0.0)
    high = max((max(curve.high) for curve in curves if curve.high), default=1.0)
    if low > 0 and high / low > wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_ylim(low * 0.85, high * 1.2)
    else:
        margin = 0.07 * (high - (0 if zero else low) or high or 1.0)
        axes.set_ylim(0 if zero else low - margin, high + margin)
    axes.yaxis.set_major_formatter("{x:,g}")
    for each in (axes.xaxis, axes.yaxis):
        each.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    top, ends = axes.get_ylim()[1], []
    for curve, look in zip(curves, looks, strict=True):
        drawn: dict[str, Any] = {"color": look.colour, "clip_on": False, "zorder": 3 if curve.kind == "unlocked" else 2}
        axes.fill_between(curve.at, curve.low, curve.high, color=look.colour, alpha=0.15, linewidth=0)
        axes.plot(curve.at, curve.middle, f"{look.line}o", linewidth=look.width, markersize=2.25 * look.width, **drawn)
        axes.plot(curve.lost, [top] * len(curve.lost), linestyle="", marker="x", markersize=6, **drawn)
        ends.append(float(axes.transData.transform((0, curve.middle[-1] if curve.middle else top))[1]))
    lowest, highest = (float(axes.transAxes.transform((0, edge))[1]) for edge in (0, 1))
    for curve, look, y in zip(curves, looks, apart(ends, _LABEL_PX, lowest, highest), strict=True):
        at = 1.0, (y - lowest) / (highest - lowest)
        style.annotate(axes, curve.name, at, (8, 0), va="center", color=look.ink, fontweight=look.weight)


def apart(positions: Sequence[float], distance: float, lowest: float, highest: float) -> list[float]:
    """Move positions as little as pushing from below and then from above does, until they are ``distance`` apart.

    In the order given; none lies above ``highest``, and none below ``lowest``, unless there are too many.
    """
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved, edge = list(positions), lowest - distance
    for index in order:
        moved[index] = edge = max(moved[index], edge + distance)
    edge = highest + distance
    for index in reversed(order):
        moved[index] = edge = min(moved[index], edge - distance)
    return moved


def _latency(row: BenchRow) -> tuple[float, float, float] | None:
    latency = row.latency_s
    return (latency[0] * 1e3, latency[0] * 1e3, latency[1] * 1e3) if latency else None


def _throughput(row: BenchRow) -> tuple[float, float, float]:
    spread = Spread.of(row.rates)
    return spread.median, spread.min, spread.max


_PANELS = {
    "latency": ("update latency of stage 0, ms (p50, band: p99)", _latency),
    "throughput": ("samples/s (median, band: all rounds)", _throughput),
}
