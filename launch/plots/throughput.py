"""throughput.png: samples per second of every row, fastest first."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from launch.bench.report import BenchRow, Report
from launch.bench.spread import Spread
from launch.plots import style
from launch.plots.words import subtitle, throughput_title, times

__all__ = ["draw_throughput"]

_LEFT_PX, _RIGHT_PX, _ROW_PX = 250, 440, 56
_COLUMNS_PX = (110, 215, 395)  # right edges of the columns with figures, from the right edge of the bars


def draw_throughput(report: Report, path: Path) -> Path:
    """Bars: the median of the rounds, whiskers from the slowest to the fastest; the yardstick as a line."""
    rows = sorted(report.rows, key=lambda row: row.rate, reverse=True)
    spreads = [Spread.of(row.rates) for row in rows]
    height = _ROW_PX * len(rows)
    headline = style.Headline(throughput_title(report), subtitle(report), report.emulated)
    figure = style.new_figure(headline, height + 130)
    width = style.WIDTH_PX - _LEFT_PX - _RIGHT_PX
    axes = style.axes_at(figure, _LEFT_PX, headline.height_px + 34, width, height)
    axes.set(xlim=(0, max(spread.max for spread in spreads)), ylim=(len(rows) - 0.5, -0.5), yticks=[])
    axes.grid(axis="x", color=style.FAINT, linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    style.name_across(axes, "samples/s: median of the rounds, whiskers from slowest to fastest")
    for y, (row, spread) in enumerate(zip(rows, spreads, strict=True)):
        colour, whiskers = _colour(row, report), [[spread.median - spread.min], [spread.max - spread.median]]
        axes.barh(y, spread.median, height=0.62, color=colour)
        axes.errorbar(spread.median, y, xerr=whiskers, fmt="none", ecolor=style.INK, elinewidth=1.0, capsize=2.5)
        ink, weight = (style.INK, "normal") if colour == style.GREY else (colour, "bold")
        put = partial(style.write, axes, transform=axes.get_yaxis_transform(), ha="right", va="center")  # y in rows
        for x, text in zip((-14, *(width + edge for edge in _COLUMNS_PX)), _words(row, report), strict=True):
            put(x / width, y, text, color=ink, fontweight=weight)
    yardstick = report.rows[0].rate
    axes.axvline(yardstick, color=style.INK, linewidth=1.0, linestyle=(0, (4, 3)))
    side = "center" if yardstick < axes.get_xlim()[1] * 0.9 else "right"
    above = partial(style.annotate, axes, offset=(0, 4), fontsize=style.SMALL)
    above("yardstick", (yardstick, 1), xycoords=("data", "axes fraction"), ha=side, color="black")
    for edge, text in zip(_COLUMNS_PX, ("samples/s", "x yardstick", "x unlocked"), strict=True):
        if text != "x unlocked" or report.unlocked is not None:
            above(text, ((width + edge) / width, 1.0), ha="right", color=style.MUTED)
    return style.save(figure, path)


def _colour(row: BenchRow, report: Report) -> str:
    if row is report.unlocked:
        return style.ACCENT
    return style.RIVAL if report.beaten_by(row) else style.GREY


def _words(row: BenchRow, report: Report) -> tuple[str, str, str, str]:
    """Name, samples per second, and the ratios to the yardstick and to unlocked."""
    against = ""
    if report.unlocked is not None and row is not report.unlocked:
        against = times(row.speedup(report.unlocked).median)
        against = f"beats it: {against}" if report.beaten_by(row) else against
    return row.name, f"{row.rate:,.0f}", times(row.speedup(report.rows[0]).median), against
