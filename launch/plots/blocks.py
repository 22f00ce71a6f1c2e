"""A stage-time diagram as it was measured: which window of a run to show, and the blocks in every lane.

stage 0  | F4 | B4  |dni| F5 | B5  |dni|      a block: one phase of one batch, from spans that follow each other
stage 1       | F4 | B4    |   | F5 | B5      blank: the stage waits
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.metrics.spans import Span, Spans

__all__ = ["PHASES", "ShownTime", "SpanBlock", "blocks", "period_s", "shared_window_s", "window_of"]

_SPANS_OF = {
    "forward": (Span.FORWARD,),
    "backward + step": (Span.BACKWARD, Span.STEP),
    "dni": (Span.DNI, Span.DNI_TRAIN),
    "relay": (Span.RELAY,),
    "send + receive": (Span.SEND, Span.RECEIVE, Span.AVERAGE),
    "other": (Span.LOAD, Span.EVALUATE, Span.QUALITY, Span.OTHER),
}
PHASES = {kind: phase for phase, kinds in _SPANS_OF.items() for kind in kinds}
"""The phase of every kind of span; waiting has none, it is left blank."""

_MOST_BATCHES = 80  # of the faster run: with more, blocks are too narrow to be seen


@dataclass(frozen=True)
class SpanBlock:
    """One phase, a value of ``PHASES``, of one batch (-1: of none), on the common clock."""

    phase: str
    batch: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class ShownTime:
    """A part of a run, on the common clock."""

    start_ns: int
    end_ns: int


def blocks(spans: Spans, window: ShownTime) -> list[SpanBlock]:
    """The blocks of one stage in a window, in order of time.

    Neighbours of one phase and batch are one block (backward and step; the wait between two of them keeps them apart).
    Blocks at the edges are cut. Seconds per phase equal those of the spans; what no block covers is waiting.
    """
    inside = spans.within(window.start_ns, window.end_ns)
    found: list[SpanBlock] = []
    columns = (inside.span, inside.batch, inside.start_ns, inside.end_ns)
    for kind, batch, start_ns, end_ns in zip(*(column.tolist() for column in columns), strict=True):
        phase, last = PHASES.get(Span(kind)), found[-1] if found else None
        if phase is None:
            continue
        if last and (last.phase, last.batch, last.end_ns) == (phase, batch, start_ns):
            start_ns = found.pop().start_ns
        found.append(SpanBlock(phase, batch, start_ns, end_ns))
    return found


def period_s(stages: Sequence[Spans]) -> float:
    """Median seconds from one batch to the next at the end of the pipeline; needs two batches, else ``ValueError``."""
    ends = sorted(stages[-1].last_end(Span.STEP).values())
    if len(ends) < 2:
        raise ValueError(f"{len(ends)} batches came out of the pipeline: two are needed for the time between them.")
    gaps = sorted(after - before for before, after in itertools.pairwise(ends))
    return gaps[len(gaps) // 2] * 1e-9


def shared_window_s(runs: Sequence[Sequence[Spans]]) -> float:
    """Seconds to show of each run, the same for all: a few batches of the slowest, not too many of the fastest."""
    periods = [period_s(stages) for stages in runs]
    slowest, fastest = max(periods), min(periods)
    wanted = max(min(3.2 * slowest, 12 * fastest), 1.25 * slowest, 4 * fastest)
    return min(wanted, _MOST_BATCHES * fastest)


def window_of(stages: Sequence[Spans], seconds: float) -> ShownTime:
    """A window of that length around the middle of the run that begins with a forward of stage 0.

    The middle is half-way between the forward of the middle batch in stage 0 and its update in the last stage: there
    the pipeline is full, if the run is long enough to fill it.
    """
    begins = sorted(stages[0].first_start(Span.FORWARD).values())
    ends = sorted(stages[-1].last_end(Span.STEP).values())
    length_ns = round(seconds * 1e9)
    latest_ns = min((begins[len(begins) // 2] + ends[len(ends) // 2] - length_ns) // 2, ends[-1] - length_ns)
    start_ns = max((start for start in begins if start <= latest_ns), default=begins[0])
    return ShownTime(start_ns, start_ns + length_ns)
