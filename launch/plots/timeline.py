"""timeline.png: the measured stage-time diagram, the best locked row above the unlocked one, on one time scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from launch.bench.report import BenchRow, Report
from launch.plots import style
from launch.plots.blocks import SpanBlock, blocks, shared_window_s, window_of
from launch.plots.words import subtitle, timeline_title
from launch.results.run_folder import read_spans

__all__ = ["draw_timeline", "shown_rows"]

_LEFT_PX, _RIGHT_PX = 120, 100
_KEY_PX, _GAP_PX, _NAME_PX, _AXIS_PX = 40, 26, 34, 70
_LANES_PX = 900  # what all lanes of all rows may take together
_DIGIT_PX = 10  # of a batch id in its block


def shown_rows(report: Report) -> list[BenchRow]:
    """The best exact locked row and the unlocked one; without both of them the first of our own rows, if any."""
    pair = [row for row in (report.best_locked, report.unlocked) if row is not None]
    return pair or [row for row in report.rows if row.middle.run_dir is not None][:1]


def draw_timeline(report: Report, path: Path) -> Path:
    """One lane per stage and row, from the spans of the round of median speed."""
    rows = shown_rows(report)
    runs = [read_spans(row.middle.run_dir) for row in rows if row.middle.run_dir is not None]
    seconds = shared_window_s(runs)
    lanes = sum(len(stages) for stages in runs)
    lane_px = max(14, min(56, _LANES_PX // lanes))
    headline = style.Headline(timeline_title(report), subtitle(report), report.emulated)
    panels_px = sum(_NAME_PX + _GAP_PX + lane_px * len(stages) for stages in runs)
    figure = style.new_figure(headline, _KEY_PX + panels_px + _AXIS_PX)
    top, seen = headline.height_px + _KEY_PX, {"waiting"}
    for index, (row, stages) in enumerate(zip(rows, runs, strict=True)):
        height = lane_px * len(stages)
        axes = style.axes_at(figure, _LEFT_PX, top + _NAME_PX, style.WIDTH_PX - _LEFT_PX - _RIGHT_PX, height)
        window = window_of(stages, seconds)
        axes.set(xlim=(0, seconds * 1e3), ylim=(len(stages) - 0.5, -0.5))
        _name_lanes(axes, row, report)
        for lane, spans in enumerate(stages):
            axes.axhspan(lane - 0.38, lane + 0.38, color=style.PHASE_COLOURS["waiting"], linewidth=0)
            found = blocks(spans, window)
            seen.update(block.phase for block in found)
            _draw_lane(axes, lane, found, window.start_ns, lane_px)
        if index < len(rows) - 1:
            axes.tick_params(labelbottom=False)
        else:
            style.name_across(axes, "milliseconds")
        top += _NAME_PX + height + _GAP_PX
    _draw_key(figure, [phase for phase in style.PHASE_COLOURS if phase in seen], headline.height_px)
    return style.save(figure, path)


def _name_lanes(axes: Axes, row: BenchRow, report: Report) -> None:
    colour = style.ACCENT if row is report.unlocked else style.INK
    style.write(axes, 0, 1.0, row.name, va="bottom", color=colour, fontweight="bold", fontsize=style.TEXT + 1.5)
    style.write(axes, 1.012, 1.0, "busy\n", va="center", fontsize=style.SMALL)
    stages = row.typical.stages if row.typical else ()
    step = 1 if len(stages) <= 16 else 4
    axes.set_yticks(range(0, len(stages), step), [f"stage {k}" for k in range(0, len(stages), step)])
    for lane in range(0, len(stages), step):
        style.write(axes, 1.012, lane, f"{stages[lane].busy:.0%}", transform=axes.get_yaxis_transform(), va="center")


def _draw_lane(axes: Axes, lane: int, found: Sequence[SpanBlock], start_ns: int, lane_px: int) -> None:
    px_per_ms = (style.WIDTH_PX - _LEFT_PX - _RIGHT_PX) / axes.get_xlim()[1]
    for phase in dict.fromkeys(block.phase for block in found):
        mine = [block for block in found if block.phase == phase]
        bars = [((block.start_ns - start_ns) * 1e-6, (block.end_ns - block.start_ns) * 1e-6) for block in mine]
        axes.broken_barh(bars, (lane - 0.38, 0.76), facecolor=style.PHASE_COLOURS[phase], linewidth=0)
    for block in found:
        text, width_ms = str(block.batch), (block.end_ns - block.start_ns) * 1e-6
        if block.phase == "forward" and width_ms * px_per_ms > _DIGIT_PX * len(text) + 4 and lane_px >= 18:
            middle = ((block.start_ns + block.end_ns) / 2 - start_ns) * 1e-6
            number = axes.text(middle, lane, text, color=style.INK, fontsize=style.SMALL, clip_on=True)
            number.set(ha="center", va="center_baseline")


def _draw_key(figure: Figure, phases: Sequence[str], top: int) -> None:
    """Coloured squares with their phases, in one line under the headline."""
    height_px = round(figure.get_figheight() * figure.dpi)
    x, y = _LEFT_PX, top + 4
    for name in phases:
        square = (x / style.WIDTH_PX, 1 - (y + 16) / height_px), 16 / style.WIDTH_PX, 16 / height_px
        edge = 0.6 if name == "waiting" else 0
        figure.add_artist(Rectangle(*square, fc=style.PHASE_COLOURS[name], ec=style.GREY, linewidth=edge))
        label = f"{name} (number: batch)" if name == "forward" else name
        at = (x + 24) / style.WIDTH_PX, 1 - (y + 8) / height_px
        figure.text(*at, label, va="center", color=style.MUTED, fontsize=style.TEXT)
        x += 24 + round(len(label) * 10.2) + 26
