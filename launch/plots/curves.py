"""latency.png and link.png: update latency and throughput over the number of stages, or over the latency of a link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from launch.bench.report import BenchRow
from launch.bench.scaling import ScalingReport, mode_name
from launch.bench.spread import Spread
from launch.plots import style
from launch.plots.words import curves_title, subtitle

__all__ = ["Curve", "apart", "curves_of", "draw_curves"]

_TOP_PX, _WIDTH_PX, _HEIGHT_PX = 50, 400, 420
_LEFTS_PX = (90, 660)
_WIDE = 20.0  # largest over smallest value from which an axis is logarithmic
_LABEL_PX = 22  # least distance of two labels


@dataclass(frozen=True)
class Curve:
    """One row over the axis.

    Attributes:
        name: of the row.
        unlocked: whether it is ours.
        values: points on the axis.
        middle: the figure at each.
        low: lower edge of the band.
        high: upper edge of the band.
    """

    name: str
    unlocked: bool
    values: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def curves_of(sweep: ScalingReport, what: str) -> list[Curve]:
    """The curves of a panel.

    Args:
        sweep: the measured points.
        what: ``latency``, of stage 0 in ms, p50 with a band up to p99; or ``throughput`` in samples per second, the
            median of the rounds with a band from the slowest to the fastest.
    """
    keyed: dict[tuple[str, str, int], list[tuple[float, BenchRow, tuple[float, float, float]]]] = {}
    for value, report in sweep.points:
        for row in report.rows:
            figure = _FIGURES[what](row)
            if figure is not None:
                c = row.contender
                keyed.setdefault((c.engine, c.mode, c.threads), []).append((value, row, figure))
    return [
        Curve(
            mode_name(found[0][1]),
            found[0][1].contender.mode == "unlocked",
            tuple(value for value, _, _ in found),
            *(tuple(figure[i] for _, _, figure in found) for i in range(3)),
        )
        for found in keyed.values()
    ]


def draw_curves(sweep: ScalingReport, path: Path) -> Path:
    """Update latency on the left, throughput on the right, one line per row, named at its end."""
    headline = style.Headline(curves_title(sweep), subtitle(sweep, over=sweep.axis.name), sweep.emulated)
    figure = style.new_figure(headline, _TOP_PX + _HEIGHT_PX + 90)
    panels = (
        ("latency", "update latency of stage 0, ms (p50, band: p99)"),
        ("throughput", "samples/s (median, band: all rounds)"),
    )
    for left, (what, heading) in zip(_LEFTS_PX, panels, strict=True):
        axes = style.axes_at(figure, left, headline.height_px + _TOP_PX, _WIDTH_PX, _HEIGHT_PX)
        axes.text(0, 1.045, heading, transform=axes.transAxes, color=style.INK, fontsize=style.TEXT, fontweight="bold")
        axes.set_xlabel(sweep.axis.label, color=style.MUTED, fontsize=style.TEXT, labelpad=8)
        _draw_panel(axes, curves_of(sweep, what), [value for value, _ in sweep.points], sweep)
    return style.save(figure, path)


def _draw_panel(axes: Axes, curves: Sequence[Curve], values: Sequence[float], sweep: ScalingReport) -> None:
    smallest = min((min(curve.low) for curve in curves), default=0.0)
    largest = max((max(curve.high) for curve in curves), default=1.0)
    logarithmic = smallest > 0 and largest / smallest > _WIDE
    if sweep.axis.name == "stages":
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.grid(axis="y", color=style.FAINT, linewidth=0.8)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_ylim(smallest * 0.8, largest * 1.25)
    else:
        axes.set_ylim(0, largest * 1.06)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.tick_params(which="minor", length=0, labelsize=0)
    for curve in sorted(curves, key=lambda curve: curve.unlocked):
        colour = style.ACCENT if curve.unlocked else style.MUTED
        axes.fill_between(curve.values, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            curve.values,
            curve.middle,
            color=colour,
            linewidth=2.2 if curve.unlocked else 1.4,
            marker="o",
            markersize=4.5 if curve.unlocked else 3.5,
            clip_on=False,
        )
    _label_ends(axes, curves)


def _label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Name every curve at its last point."""
    at = [float(axes.transData.transform((curve.values[-1], curve.middle[-1]))[1]) for curve in curves]
    lowest, highest = (float(axes.transAxes.transform((0, edge))[1]) for edge in (0, 1))
    for curve, y in zip(curves, apart(at, _LABEL_PX, lowest, highest), strict=True):
        axes.annotate(
            curve.name,
            (1.0, (y - lowest) / (highest - lowest)),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.TEXT,
            color=style.ACCENT if curve.unlocked else style.INK,
            fontweight="bold" if curve.unlocked else "normal",
            annotation_clip=False,
        )


def apart(positions: Sequence[float], distance: float, lowest: float, highest: float) -> list[float]:
    """Move positions as little as pushing from below and then from above does, until they are apart.

    Args:
        positions: in any order.
        distance: least distance of two of them.
        lowest: none lies below it, unless there are too many.
        highest: none lies above it.

    Returns:
        the new positions, in the order given.
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
    latency = row.typical.stages[0].update_latency_s if row.typical else None
    return (latency[0] * 1e3, latency[0] * 1e3, latency[1] * 1e3) if latency else None


def _throughput(row: BenchRow) -> tuple[float, float, float]:
    spread = Spread.of(row.rates)
    return spread.median, spread.min, spread.max


_FIGURES = {"latency": _latency, "throughput": _throughput}
