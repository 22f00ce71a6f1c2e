"""What the measuring itself costs, found in two ways: the same training with spans and without, and by counting.

    round 1: unlocked, unlocked-bare    round 2: unlocked-bare, unlocked    ...    a drift of the machine cancels out

Pairs see everything, but a machine whose speed differs by several percent from run to run hides a small cost. The
count, records of a batch times what one takes, sees nothing but the recorder, and sees it sharply.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from math import comb
from pathlib import Path

from pipeline.metrics.measurements import Measured
from pipeline.metrics.spans import Span
from workers.channels.shm.ring import new_prefix
from workers.clock import now_ns
from workers.telemetry.span_recorder import SpanRecorder
from workers.telemetry.status_table import StatusTable

__all__ = ["PAIR", "cost_by_count", "cost_of_spans", "median_interval", "record_s"]

PAIR = ("unlocked", "unlocked-bare")
"""The rows that are compared."""


def cost_of_spans(with_spans: Sequence[float], without: Sequence[float]) -> str:
    """How much longer a sample takes with spans than without: median of the rounds, with its confidence interval.

    Args:
        with_spans: throughput of every round.
        without: throughput of the same rounds without spans.
    """
    costs = [100 * (bare / full - 1) for full, bare in zip(with_spans, without, strict=True)]
    interval = median_interval(costs)
    low, high = interval or (min(costs), max(costs))
    of = f"95 % confidence, {len(costs)} pairs" if interval else f"smallest and largest of {len(costs)} pairs"
    return f"Instrumentation costs {statistics.median(costs):.1f} % ({low:.1f} to {high:.1f}; {of})."


def cost_by_count(measured: Measured, one_record_s: float) -> str:
    """The share of the time that the busiest recorder takes.

    Args:
        measured: a run with spans.
        one_record_s: what one record takes, see ``record_s``.
    """
    most = max(stage.records for stage in measured.stages)
    return (
        f"Counted, it is {100 * most * one_record_s / measured.seconds:.2g} %: up to {most / measured.batches:.0f} "
        f"records a batch, {one_record_s * 1e6:.1f} us each."
    )


def record_s(rounds: int = 20, records: int = 2000) -> float:
    """Seconds that one record of a ``SpanRecorder`` takes here: the fastest round, as noise only adds.

    Blocks for ``rounds`` times ``records`` records, some 0.1 s.
    """
    name = f"{new_prefix()}-r"
    with StatusTable(name, 1, create=True) as board, tempfile.TemporaryDirectory() as folder:
        StatusTable.unlink_name(name)
        record = SpanRecorder(0, board, Path(folder, "spans.npy"))
        fastest_ns = min(_round_ns(record, records) for _ in range(rounds))
        record.close()
    return fastest_ns * 1e-9 / records


def _round_ns(record: SpanRecorder, records: int) -> int:
    begin_ns = now_ns()
    for number in range(records):
        record(Span.STEP, number)
    return now_ns() - begin_ns


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the median lies with a confidence of at least 95 %, whatever the distribution; None for less than 6 values.

    Between the k-th smallest and the k-th largest value, with the largest k for which n tosses of a coin come up heads
    fewer than k times with a probability of at most 2.5 % (the interval of the sign test).
    """
    ordered, n = sorted(values), len(values)
    fewer, k = 0, 0  # ways to toss fewer than k heads
    while 40 * (fewer + comb(n, k)) <= 2**n:
        fewer += comb(n, k)
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None
