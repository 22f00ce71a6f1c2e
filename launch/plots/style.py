"""What all pictures share: size, palette (Okabe and Ito 2008, safe for the colour-blind), headline, axes in pixels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from workers.files import replacing

__all__ = [
    "ACCENT",
    "FAINT",
    "GREY",
    "INK",
    "MUTED",
    "PHASE_COLOURS",
    "RIVAL",
    "SMALL",
    "TEXT",
    "WIDTH_PX",
    "Headline",
    "annotate",
    "axes_at",
    "joined",
    "name_across",
    "new_figure",
    "save",
    "write",
]

WIDTH_PX = 1200
_DPI = 150
_LEFT_PX, _TOP_PX = 40, 24
INK = "#1b2733"
MUTED = "#5d6b79"
GREY = "#a7b2bd"
FAINT = "#dfe4e9"
ACCENT = "#0072b2"  # unlocked
RIVAL = "#d55e00"  # what beats it
PHASE_COLOURS = {
    "forward": "#56b4e9",
    "backward + step": "#0072b2",
    "dni": "#e69f00",
    "relay": "#cc79a7",
    "send + receive": "#009e73",
    "other": "#c3cbd3",
    "waiting": "#f1f3f5",
}
TEXT = 8.5  # points
SMALL = 7.0
_SEPARATOR = "  ·  "  # between the parts of a subtitle, where its lines break
_TITLE = 13.5
_TITLE_CHARACTERS, _SUBTITLE_CHARACTERS = 60, 120
_LINE = 1.35  # height of a line in letter heights


@dataclass(frozen=True)
class Headline:
    """What a picture says, and under which circumstances; one or two lines each. ``emulated`` is marked as such."""

    title: str
    subtitle: str
    emulated: bool

    @property
    def lines(self) -> list[tuple[str, float, str, str]]:
        """(text, points, colour, weight) from above."""
        lines = [(line, _TITLE, INK, "bold") for line in _wrapped(self.title, _TITLE_CHARACTERS)]
        return lines + [(line, TEXT, MUTED, "normal") for line in _wrapped(self.subtitle, _SUBTITLE_CHARACTERS)]

    @property
    def height_px(self) -> int:
        """Pixels from the upper edge to where the picture may begin."""
        return round(_TOP_PX + sum(size for _, size, _, _ in self.lines) * _LINE * _DPI / 72 + _TOP_PX)


def new_figure(headline: Headline, below_px: int) -> Figure:
    """A picture with its headline and ``below_px`` empty pixels under it, outside of pyplot's global state."""
    height_px = headline.height_px + below_px
    figure = Figure(figsize=(WIDTH_PX / _DPI, height_px / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    top = float(_TOP_PX)
    for text, size, colour, weight in headline.lines:
        x, y = _LEFT_PX / WIDTH_PX, 1 - top / height_px
        figure.text(x, y, text, fontsize=size, color=colour, fontweight=weight, va="top")
        top += size * _DPI / 72 * _LINE
    if headline.emulated:
        box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": RIVAL, "linewidth": 0.8}
        how: dict[str, Any] = {"fontsize": SMALL, "color": RIVAL, "fontweight": "bold", "va": "top", "ha": "right"}
        figure.text(1 - _LEFT_PX / WIDTH_PX, 1 - (_TOP_PX + 7) / height_px, "EMULATED", bbox=box, **how)
    return figure


def write(axes: Axes, x: float, y: float, text: str, **how: Any) -> None:
    """Write at a place of the axes, in parts of them, unless another ``transform`` is given."""
    axes.text(x, y, text, **{"transform": axes.transAxes, "color": MUTED, "fontsize": TEXT, **how})


def annotate(axes: Axes, text: str, at: tuple[float, float], offset: tuple[int, int], **how: Any) -> None:
    """Write so many points beside a place of the axes, in parts of them, unless other ``xycoords`` are given."""
    how = {"xycoords": "axes fraction", "fontsize": TEXT, "color": INK, **how}
    axes.annotate(text, at, offset, textcoords="offset points", annotation_clip=False, **how)


def name_across(axes: Axes, text: str) -> None:
    """Say what the axis across is."""
    axes.set_xlabel(text, color=MUTED, fontsize=TEXT, labelpad=8)


def axes_at(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    """Axes without a frame; pixels from the upper left corner."""
    height_px = figure.get_figheight() * _DPI
    axes = figure.add_axes((left / WIDTH_PX, 1 - (top + height) / height_px, width / WIDTH_PX, height / height_px))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=TEXT, labelcolor=MUTED)
    axes.set_axisbelow(True)
    return axes


def save(figure: Figure, path: Path) -> Path:
    """Write the picture as PNG."""
    with replacing(path) as draft:
        figure.savefig(draft, dpi=_DPI, format="png")
    return path


def joined(parts: Sequence[str]) -> str:
    """A subtitle; its lines break between the parts."""
    return _SEPARATOR.join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)


def _wrapped(text: str, characters: int) -> list[str]:
    lines = textwrap.wrap(text, characters, break_on_hyphens=False, max_lines=2, placeholder=" ...")
    return [line.removesuffix(_SEPARATOR.rstrip()) for line in lines]
