"""What the pictures say in words: findings for titles, circumstances for subtitles."""

from __future__ import annotations

from launch.bench.report import Report
from launch.bench.scaling import ScalingReport
from launch.plots.style import joined

__all__ = ["curves_title", "subtitle", "throughput_title", "timeline_title", "times"]


def subtitle(report: Report, over: str | None = None) -> str:
    """Recipe, stages, batch, rounds, host, and what was emulated; without what the picture is over."""
    plan = report.resolved.plan
    rounds = len(report.rows[0].outcomes)
    parts = [report.recipe]
    parts += [] if over == "stages" else [f"{plan.stages} {'stage' if plan.stages == 1 else 'stages'}"]
    parts += [
        f"batch {report.resolved.step_rows}",
        f"{rounds} {'round' if rounds == 1 else 'rounds'} of {report.resolved.steps:,} batches",
        f"{report.environment['processor'] or 'unknown processor'}, {report.environment['cores']} cores",
    ]
    given = [text for text in (plan.emulate, None if over == "latency_ms" else plan.link) if text is not None]
    parts += [f"emulated {','.join(given)}"] if given else []
    return joined(parts)


def throughput_title(report: Report) -> str:
    """Unlocked against the yardstick and the best exact locked row."""
    unlocked = report.unlocked
    if unlocked is None:
        return f"{report.fastest.name} is fastest"
    rivals = {row.name: row for row in (report.rows[0], report.best_locked) if row and row is not unlocked}
    gains = [f"{times(unlocked.speedup(row).median)} {name}" for name, row in rivals.items()]
    faster = [row for row in report.rows if report.beaten_by(row)]
    title = f"Unlocked: {', '.join(gains)}" if gains else "Unlocked"
    if faster:
        title += f"; {faster[0].name if len(faster) == 1 else f'{len(faster)} rows'} beat{'s' * (len(faster) == 1)} it"
    return title


def timeline_title(report: Report) -> str:
    """How much the stages wait, locked and unlocked."""
    waits = []
    for row in (report.unlocked, report.best_locked):
        if row is not None and row.typical is not None:
            shares = [stage.shares["waiting"] for stage in row.typical.stages]
            waits.append(f"{row.name} {sum(shares) / len(shares):.0%}")
    return f"Time in which stages wait: {', '.join(waits)}" if waits else "Stages over time, as measured"


def curves_title(sweep: ScalingReport) -> str:
    """The last point of the axis."""
    value, report = sweep.points[-1]
    text = f"At {value:g} {sweep.axis.unit}: "
    unlocked, locked = report.unlocked, report.best_locked
    if unlocked is None or locked is None:
        return f"{text}{report.fastest.name} is fastest"
    text += f"unlocked {times(unlocked.speedup(locked).median)} the throughput of {locked.name}"
    if (mine := unlocked.latency_s) and (theirs := locked.latency_s):
        text += f", updates after {_ms(mine[0])} instead of {_ms(theirs[0])} ms"
    return text


def times(ratio: float) -> str:
    """A ratio with three figures or so."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"
