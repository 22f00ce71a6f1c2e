"""sweep.png: error or loss over the first number that was varied, a curve for every combination of the other values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.plots import style
from launch.plots.curves import BELOW_PX, TOP_PX, WIDE, Curve, Look, draw_panel
from launch.results.environment import environment
from launch.sweep.axes import Axis
from launch.sweep.findings import METRICS, Finding, label_of
from launch.sweep.grid import Grid

__all__ = ["abscissa_of", "draw_grid", "sweep_curves"]

_LEFT_PX, _WIDTH_PX, _HEIGHT_PX = 90, 780, 520
_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d6b79", "#8c564b", "#bcbd22")


def abscissa_of(grid: Grid) -> Axis | None:
    """The first axis of several numbers, else the first one; None: nothing was varied."""
    several = [axis for axis in grid.axes if len(axis.labels) > 1]
    return next((axis for axis in several if axis.numbers), next(iter(several or grid.axes), None))


def sweep_curves(grid: Grid, findings: Sequence[Finding]) -> list[Curve]:
    """The curves, in the order of the table."""
    across = abscissa_of(grid)
    index = grid.axes.index(across) if across else -1
    grouped: dict[tuple[str, ...], list[tuple[float, Finding]]] = {}
    for finding in findings:
        labels = finding.setting.labels
        place = across.places[across.labels.index(labels[index])] if across else 0.0
        others = tuple(label for i, label in enumerate(labels) if i != index)
        grouped.setdefault(others, []).append((place, finding))
    return [_curve(grid, across, sorted(found, key=lambda pair: pair[0])) for found in grouped.values()]


def draw_grid(grid: Grid, findings: Sequence[Finding], verdict: str, path: Path) -> Path:
    """Draw it; a cross at the upper edge is a setting of which a seed diverged."""
    across, curves = abscissa_of(grid), sweep_curves(grid, findings)
    headline = style.Headline(verdict.partition(". ")[0], _subtitle(grid), emulated=False)
    figure = style.new_figure(headline, TOP_PX + _HEIGHT_PX + BELOW_PX)
    axes = style.axes_at(figure, _LEFT_PX, headline.height_px + TOP_PX, _WIDTH_PX, _HEIGHT_PX)
    axes.set_xticks([])
    if across is not None:
        if across.numbers and min(across.places) > 0 and max(across.places) / min(across.places) > WIDE:
            axes.set_xscale("log")
        axes.set_xticks(across.places, across.labels)
        style.name_across(axes, across.name)
    heading = f"held-out {METRICS[grid.metric].heading} (mean, band: smallest to largest of the seeds)"
    draw_panel(axes, heading, curves, _looks(curves), WIDE / 4, zero=False)
    return style.save(figure, path)


def _curve(grid: Grid, across: Axis | None, found: Sequence[tuple[float, Finding]]) -> Curve:
    whole = [(place, f) for place, f in found if f.mean is not None]
    backprop, unlocked = all(f.setting.backprop for _, f in found), any(f.setting.plan.unlocked for _, f in found)
    return Curve(
        name=label_of(grid, found[0][1].setting, left_out=[across.name] if across else []),
        kind="backprop" if backprop else "unlocked" if unlocked else "",
        at=tuple(place for place, _ in whole),
        middle=tuple(f.mean for _, f in whole if f.mean is not None),
        low=tuple(min(f.figures.values()) for _, f in whole),
        high=tuple(max(f.figures.values()) for _, f in whole),
        lost=tuple(place for place, f in found if f.mean is None),
    )


def _looks(curves: Sequence[Curve]) -> list[Look]:
    """One unlocked curve has the colour that unlocked has everywhere; several need one each."""
    kinds, others = [curve.kind for curve in curves], iter(_COLOURS * len(curves))
    fixed = {"backprop": style.INK, **({"unlocked": style.ACCENT} if kinds.count("unlocked") == 1 else {})}
    colours = [fixed.get(kind) or next(others) for kind in kinds]
    lines = ["--" if kind == "backprop" else "-" for kind in kinds]
    return [Look(colour, colour, line=line) for colour, line in zip(colours, lines, strict=True)]


def _subtitle(grid: Grid) -> str:
    work = f"{grid.first.plan.steps:,} batches of {grid.first.batch_shape[0]}"
    seeds = f"{len(grid.seeds)} {'seed' if len(grid.seeds) == 1 else 'seeds'}"
    return style.joined([grid.title, work, seeds, "reference driver", f"torch {environment()['torch']}"])
