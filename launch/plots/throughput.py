"""throughput.png: samples per second of every row, fastest first."""

from __future__ import annotations

from pathlib import Path

from launch.bench import Report, Row
from launch.plots import style
from launch.plots.words import subtitle, throughput_title
from launch.spread import Spread

__all__ = ["draw_throughput"]

_LEFT_PX, _RIGHT_PX, _ROW_PX = 250, 330, 58


def draw_throughput(report: Report, path: Path) -> Path:
    """Bars: the median of the rounds, whiskers from the slowest to the fastest; the yardstick as a line."""
    rows = sorted(report.rows, key=lambda row: Spread.of(row.rates).median, reverse=True)
    spreads = [Spread.of(row.rates) for row in rows]
    height = _ROW_PX * len(rows)
    figure = style.new_figure(style.HEADLINE_PX + height + 100)
    style.write_headline(figure, throughput_title(report), subtitle(report), emulated=report.emulated)
    axes = style.axes_at(figure, _LEFT_PX, style.HEADLINE_PX + 14, style.WIDTH_PX - _LEFT_PX - _RIGHT_PX, height)
    axes.set(xlim=(0, max(spread.max for spread in spreads)), ylim=(len(rows) - 0.5, -0.5), yticks=[])
    axes.grid(axis="x", color=style.FAINT, linewidth=0.8)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(
        "samples per second: median of the rounds, whiskers from slowest to fastest",
        color=style.MUTED,
        fontsize=style.TEXT,
        labelpad=8,
    )
    for y, (row, spread) in enumerate(zip(rows, spreads, strict=True)):
        colour = _colour(row, report)
        axes.barh(y, spread.median, height=0.62, color=colour)
        low, high = spread.median - spread.min, spread.max - spread.median
        axes.errorbar(spread.median, y, xerr=[[low], [high]], fmt="none", ecolor=style.INK, elinewidth=1.0, capsize=2.5)
        bold = "bold" if colour != style.GREY else "normal"
        ink = style.INK if colour == style.GREY else colour
        beside = axes.get_yaxis_transform()  # x in parts of the axes, y in rows
        axes.text(
            -0.02,
            y,
            row.name,
            transform=beside,
            ha="right",
            va="center",
            color=ink,
            fontweight=bold,
            fontsize=style.TEXT,
        )
        axes.text(
            1.02,
            y,
            _figures(row, report),
            transform=beside,
            va="center",
            color=ink,
            fontweight=bold,
            fontsize=style.TEXT,
        )
    yardstick = Spread.of(report.rows[0].rates).median
    axes.axvline(yardstick, color=style.INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        "yardstick",
        (yardstick, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=style.SMALL,
        color=style.INK,
    )
    return style.save(figure, path)


def _beats(row: Row, report: Report) -> bool:
    """Whether a row is faster than the unlocked one, round by round."""
    return report.unlocked is not None and row.speedup(report.unlocked).median > 1


def _colour(row: Row, report: Report) -> str:
    if row is report.unlocked:
        return style.ACCENT
    return style.RIVAL if _beats(row, report) else style.GREY


def _figures(row: Row, report: Report) -> str:
    text = f"{Spread.of(row.rates).median:,.0f}   {row.speedup(report.rows[0]).median:.2f}x"
    if _beats(row, report) and report.unlocked is not None:
        text += f"   beats unlocked {row.speedup(report.unlocked).median:.2f}x"
    return text
