"""What all pictures share: size, palette (Okabe and Ito 2008, safe for the colour-blind), headline, axes in pixels."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "FAINT",
    "GREY",
    "HEADLINE_PX",
    "INK",
    "MUTED",
    "PHASE_COLOURS",
    "RIVAL",
    "SMALL",
    "TEXT",
    "WIDTH_PX",
    "axes_at",
    "new_figure",
    "save",
    "write_headline",
]

WIDTH_PX = 1200
HEADLINE_PX = 150
_DPI = 150
_LEFT_PX = 40

INK, MUTED, FAINT, GREY = "#1b2733", "#5d6b79", "#dfe4e9", "#a7b2bd"
ACCENT, RIVAL = "#0072b2", "#d55e00"
PHASE_COLOURS = {
    "forward": "#56b4e9",
    "backward + step": "#0072b2",
    "dni": "#e69f00",
    "relay": "#cc79a7",
    "send + receive": "#009e73",
    "other": "#c3cbd3",
}
TEXT, SMALL = 8.5, 7.0  # points
_TITLE = 13.5


def new_figure(height_px: int) -> Figure:
    """An empty picture of ``WIDTH_PX`` by ``height_px`` pixels, outside of pyplot's global state."""
    figure = Figure(figsize=(WIDTH_PX / _DPI, height_px / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    """Axes without a frame; pixels from the upper left corner."""
    height_px = figure.get_figheight() * _DPI
    axes = figure.add_axes((left / WIDTH_PX, 1 - (top + height) / height_px, width / WIDTH_PX, height / height_px))
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=TEXT, labelcolor=MUTED)
    axes.set_axisbelow(True)
    return axes


def write_headline(figure: Figure, title: str, subtitle: str, *, emulated: bool) -> None:
    """What the picture says, and under which circumstances; fits into ``HEADLINE_PX`` pixels."""
    lines = [(line, _TITLE, INK, "bold") for line in textwrap.wrap(title, 70)[:2]]
    lines += [(line, TEXT, MUTED, "normal") for line in textwrap.wrap(subtitle, 118)[:2]]
    height_px, top = figure.get_figheight() * _DPI, 24.0
    for text, size, colour, weight in lines:
        figure.text(
            _LEFT_PX / WIDTH_PX, 1 - top / height_px, text, fontsize=size, color=colour, fontweight=weight, va="top"
        )
        top += size * _DPI / 72 * 1.35
    if emulated:
        figure.text(
            1 - _LEFT_PX / WIDTH_PX,
            1 - 30 / height_px,
            "EMULATED",
            fontsize=SMALL,
            color=RIVAL,
            fontweight="bold",
            va="top",
            ha="right",
            bbox={"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": RIVAL, "linewidth": 0.8},
        )


def save(figure: Figure, path: Path) -> Path:
    """Write the picture as PNG."""
    figure.savefig(path, dpi=_DPI, format="png")
    return path
