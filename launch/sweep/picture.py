"""sweep.png: error or loss over the first number that was varied, a curve for every combination of the other values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from launch.plots import style
from launch.plots.curves import apart
from launch.results.environment import environment
from launch.sweep.axes import Axis
from launch.sweep.findings import METRICS, Finding, label_of
from launch.sweep.grid import Grid

__all__ = ["SweepCurve", "abscissa_of", "draw_grid", "sweep_curves"]

_TOP_PX, _LEFT_PX, _WIDTH_PX, _HEIGHT_PX = 50, 90, 780, 520
_WIDE = 20.0  # largest over smallest value from which an axis is logarithmic
_LABEL_PX = 22  # least distance of two labels
_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d6b79", "#8c564b", "#bcbd22")


@dataclass(frozen=True)
class SweepCurve:
    """One combination of the values that are not on the axis.

    Attributes:
        name: what they are.
        backprop: whether it is backpropagation.
        unlocked: whether it is unlocked.
        at: places on the axis of the settings with a figure of every seed.
        mean: the figure at each.
        low: smallest of the seeds.
        high: largest of the seeds.
        lost: places of settings that diverged.
    """

    name: str
    backprop: bool
    unlocked: bool
    at: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    lost: tuple[float, ...]


def abscissa_of(grid: Grid) -> Axis | None:
    """The first axis of several numbers, else the first one; None: nothing was varied."""
    several = [axis for axis in grid.axes if len(axis.labels) > 1]
    return next((axis for axis in several if axis.numbers), next(iter(several or grid.axes), None))


def sweep_curves(grid: Grid, findings: Sequence[Finding]) -> list[SweepCurve]:
    """The curves, in the order of the table; values without numbers stand at 0, 1, 2 ..."""
    across = abscissa_of(grid)
    index = grid.axes.index(across) if across else -1
    numbers = (across.numbers or tuple(range(len(across.labels)))) if across else ()
    grouped: dict[tuple[str, ...], list[tuple[float, Finding]]] = {}
    for finding in findings:
        labels = finding.setting.labels
        place = numbers[across.labels.index(labels[index])] if across else 0.0
        others = tuple(label for i, label in enumerate(labels) if i != index)
        grouped.setdefault(others, []).append((place, finding))
    return [_curve(grid, across, sorted(found, key=lambda pair: pair[0])) for found in grouped.values()]


def draw_grid(grid: Grid, findings: Sequence[Finding], verdict: str, path: Path) -> Path:
    """Draw it; a cross at the upper edge is a setting of which a seed diverged."""
    metric, across, curves = METRICS[grid.metric], abscissa_of(grid), sweep_curves(grid, findings)
    headline = style.Headline(verdict.partition(". ")[0], _subtitle(grid), emulated=False)
    figure = style.new_figure(headline, _TOP_PX + _HEIGHT_PX + 90)
    axes = style.axes_at(figure, _LEFT_PX, headline.height_px + _TOP_PX, _WIDTH_PX, _HEIGHT_PX)
    what = f"held-out {metric.heading} (mean, band: smallest to largest of the seeds)"
    axes.text(0, 1.035, what, transform=axes.transAxes, color=style.INK, fontsize=style.TEXT, fontweight="bold")
    _scale(axes, across, curves)
    colours = iter(_COLOURS * len(curves))
    ends = []
    for curve in curves:
        colour = style.INK if curve.backprop else style.ACCENT if curve.unlocked and _lone(curves) else next(colours)
        line = "--" if curve.backprop else "-"
        axes.fill_between(curve.at, curve.low, curve.high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(curve.at, curve.mean, line, color=colour, linewidth=1.8, marker="o", markersize=4, clip_on=False)
        top = [axes.get_ylim()[1]] * len(curve.lost)
        axes.plot(curve.lost, top, linestyle="", color=colour, marker="x", markersize=6, clip_on=False)
        ends.append((curve.name, colour, curve.mean[-1] if curve.mean else axes.get_ylim()[1]))
    _label_ends(axes, ends)
    return style.save(figure, path)


def _curve(grid: Grid, across: Axis | None, found: Sequence[tuple[float, Finding]]) -> SweepCurve:
    whole = [(place, f) for place, f in found if f.mean is not None]
    return SweepCurve(
        name=label_of(grid, found[0][1].setting, left_out=[across.name] if across else []),
        backprop=all(f.setting.backprop for _, f in found),
        unlocked=any(f.setting.plan.unlocked for _, f in found),
        at=tuple(place for place, _ in whole),
        mean=tuple(f.mean for _, f in whole if f.mean is not None),
        low=tuple(min(f.figures.values()) for _, f in whole),
        high=tuple(max(f.figures.values()) for _, f in whole),
        lost=tuple(place for place, f in found if f.mean is None),
    )


def _lone(curves: Sequence[SweepCurve]) -> bool:
    """One unlocked curve has the colour that unlocked has everywhere; several need one each."""
    return sum(curve.unlocked for curve in curves) == 1


def _scale(axes: Axes, across: Axis | None, curves: Sequence[SweepCurve]) -> None:
    axes.grid(axis="y", color=style.FAINT, linewidth=0.8)
    if across is not None:
        places = across.numbers or tuple(range(len(across.labels)))
        if across.numbers and min(places) > 0 and max(places) / min(places) > _WIDE:
            axes.set_xscale("log")
        axes.set_xticks(places, across.labels)
        axes.set_xlabel(across.name, color=style.MUTED, fontsize=style.TEXT, labelpad=8)
    else:
        axes.set_xticks([])
    low = min((min(curve.low) for curve in curves if curve.low), default=0.0)
    high = max((max(curve.high) for curve in curves if curve.high), default=1.0)
    if low > 0 and high / low > _WIDE / 4:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_ylim(low * 0.9, high * 1.15)
    else:
        margin = 0.08 * (high - low or high or 1.0)
        axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter("{x:,g}")
    for each in (axes.xaxis, axes.yaxis):
        each.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _label_ends(axes: Axes, ends: Sequence[tuple[str, str, float]]) -> None:
    """Name every curve at its last point, in its colour."""
    at = [float(axes.transData.transform((0, y))[1]) for _, _, y in ends]
    lowest, highest = (float(axes.transAxes.transform((0, edge))[1]) for edge in (0, 1))
    for (name, colour, _), y in zip(ends, apart(at, _LABEL_PX, lowest, highest), strict=True):
        axes.annotate(
            name,
            (1.0, (y - lowest) / (highest - lowest)),
            xycoords="axes fraction",
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.TEXT,
            color=colour,
            annotation_clip=False,
        )


def _subtitle(grid: Grid) -> str:
    plan, where = grid.first.plan, environment()
    parts = [
        grid.title,
        f"{plan.steps:,} batches of {grid.first.batch_shape[0]}",
        f"{len(grid.seeds)} {'seed' if len(grid.seeds) == 1 else 'seeds'}",
        "reference driver",
        f"torch {where['torch']}",
    ]
    return style.SEPARATOR.join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
