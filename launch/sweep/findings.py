"""What a sweep found: a figure per setting over its seeds, set against backpropagation on the same work; the verdict.

Figures are better when they are lower: the held-out error in %, or the held-out loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from launch.sweep.axes import ROW
from launch.sweep.grid import Grid, Setting
from launch.sweep.points import Outcome

__all__ = ["METRICS", "Finding", "Metric", "findings_json", "findings_of", "label_of", "verdict_of"]


@dataclass(frozen=True)
class Metric:
    """What is compared: the heading of a column or axis, the unit of a difference if it has a name, decimals shown, and
    whether it is a share of wrong answers; else it is a loss.
    """

    heading: str
    unit: str
    decimals: int
    percent: bool

    def of(self, outcome: Outcome) -> float | None:
        """The figure of a run; None: it diverged."""
        if not self.percent:
            return outcome.loss
        return None if outcome.accuracy is None else 100 * (1 - outcome.accuracy)

    def text(self, value: float, sign: str = "") -> str:
        """As in a table; with ``sign="+"`` a difference."""
        return f"{value:{sign}.{self.decimals}f}"

    def said(self, value: float) -> str:
        """As in a sentence."""
        return f"{self.text(value)} %" if self.percent else f"loss {self.text(value)}"


METRICS = {"error": Metric("error %", "points", 2, percent=True), "loss": Metric("loss", "", 4, percent=False)}


@dataclass(frozen=True)
class Finding:
    """A setting and what it gave, by seed.

    Attributes:
        outcomes: those that are there.
        figures: of the runs that did not diverge.
        above: the figure minus that of backpropagation on the same work and seed; empty without one.
    """

    setting: Setting
    outcomes: Mapping[int, Outcome]
    figures: Mapping[int, float]
    above: Mapping[int, float]

    @property
    def diverged(self) -> list[Outcome]:
        """The runs that gave no figure."""
        return [outcome for seed, outcome in self.outcomes.items() if seed not in self.figures]

    @property
    def mean(self) -> float | None:
        """Over the seeds; None: not every run gave a figure."""
        return statistics.fmean(self.figures.values()) if self.figures and not self.diverged else None

    @property
    def cosines(self) -> list[float]:
        """Median over the seeds of the synthetic gradients' cosine with the true ones, per cut; empty without any."""
        by_cut: dict[int, list[float]] = {}
        for quality in (each for outcome in self.outcomes.values() for each in outcome.quality):
            by_cut.setdefault(quality.stage, []).append(quality.cosine)
        return [statistics.median(by_cut[stage]) for stage in sorted(by_cut)]


def findings_of(grid: Grid, outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """One per setting of which anything is there, in the order of the table."""
    metric = METRICS[grid.metric]
    bare = []
    for setting in grid.settings:
        mine = {seed: outcomes[point.key] for seed, point in setting.points.items() if point.key in outcomes}
        figures = {seed: value for seed, o in mine.items() if (value := metric.of(o)) is not None}
        if mine:
            bare.append(Finding(setting, mine, figures, {}))
    return [Finding(f.setting, f.outcomes, f.figures, _above(f, bare)) for f in bare]


def _above(finding: Finding, others: Sequence[Finding]) -> dict[int, float]:
    """Seed by seed above backpropagation: with the same recipe and steps, and the same optimizer where there is one."""
    mine = finding.setting
    same_work = [f for f in others if (f.setting.source, f.setting.plan.steps) == (mine.source, mine.plan.steps)]
    rivals = [f for f in same_work if f.setting.backprop and f.mean is not None]
    if mine.backprop or not rivals:
        return {}
    figures = min(rivals, key=lambda f: (f.setting.plan.optimizer != mine.plan.optimizer, f.mean)).figures
    return {seed: value - figures[seed] for seed, value in finding.figures.items() if seed in figures}


def label_of(grid: Grid, setting: Setting, left_out: Sequence[str] = ()) -> str:
    """``unlocked, hop-steps 4``: the values of a setting in words."""
    parts = []
    for axis, label in zip(grid.axes, setting.labels, strict=True):
        if axis.name not in left_out:
            if axis.name in (ROW, "mode", "dni.form", "targets"):
                parts.append(label)
            elif label in ("true", "false"):
                parts.append(axis.name if label == "true" else f"no {axis.name}")
            else:
                parts.append(f"{axis.name} {label}")
    return ", ".join(parts) or "the run"


def verdict_of(grid: Grid, findings: Sequence[Finding]) -> str:
    """What is best, and how far the best that is not backpropagation lies from it."""
    metric = METRICS[grid.metric]
    ranked = sorted((f for f in findings if f.mean is not None), key=lambda f: (f.mean, not f.setting.backprop))
    sentences = []
    if ranked:
        sentences.append(f"Best: {_named(grid, ranked[0])}, {_said(ranked[0], metric)}.")
    others = [f for f in ranked if not f.setting.backprop]
    if others and len(others) < len(ranked):
        best = others[0]
        subject = "It" if best is ranked[0] else f"The best of the others, {_named(grid, best)}, {_said(best, metric)},"
        sentences.append(f"{subject} is {_against(best, metric)}.")
    if lost := [f for f in findings if f.diverged]:
        names = "; ".join(f"{_named(grid, f)} ({len(f.diverged)} of {len(f.outcomes)} seeds)" for f in lost)
        sentences.append(f"Diverged: {names}.")
    return " ".join(sentences) or "Nothing was run."


def findings_json(grid: Grid, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The field ``settings`` of sweep.json."""
    return [
        {
            "setting": dict(zip((axis.name for axis in grid.axes), f.setting.labels, strict=True)),
            "mode": f.setting.plan.mode,
            "stages": f.setting.plan.stages,
            "backprop": f.setting.backprop,
            "plan": f.setting.plan.as_dict(),
            grid.metric: {"mean": f.mean, **_edges(f.figures)},
            "above_backprop": {"mean": statistics.fmean(f.above.values()), **_edges(f.above)} if f.above else None,
            "runs": [
                {
                    "seed": seed,
                    "point": f.setting.points[seed].key,
                    **msgspec.to_builtins(outcome),
                    "dni_share": outcome.dni_share,
                }
                for seed, outcome in f.outcomes.items()
            ],
        }
        for f in findings
    ]


def _edges(figures: Mapping[int, float]) -> dict[str, float | None]:
    values = figures.values()
    return {"min": min(values, default=None), "max": max(values, default=None)}


def _named(grid: Grid, finding: Finding) -> str:
    label = label_of(grid, finding.setting)
    return f"{label} (backpropagation)" if finding.setting.backprop else label


def _said(finding: Finding, metric: Metric) -> str:
    """``1.73 % (1.67 to 1.80, 3 seeds)``."""
    values = list(finding.figures.values())
    assert finding.mean is not None
    spread = f"{metric.text(min(values))} to {metric.text(max(values))}, " if len(values) > 1 else ""
    return f"{metric.said(finding.mean)} ({spread}{len(values)} {'seed' if len(values) == 1 else 'seeds'})"


def _against(finding: Finding, metric: Metric) -> str:
    """``0.28 points below backpropagation (-0.40 to -0.10)``."""
    if not finding.above:
        return "not comparable: backpropagation was run on other work"
    values = list(finding.above.values())
    mean = statistics.fmean(values)
    spread = f" ({metric.text(min(values), '+')} to {metric.text(max(values), '+')})" if len(values) > 1 else ""
    distance = f"{metric.text(abs(mean))} {metric.unit}".rstrip()
    return f"{distance} {'below' if mean < 0 else 'above'} backpropagation{spread}"
