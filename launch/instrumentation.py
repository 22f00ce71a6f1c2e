"""What the measuring itself costs: the same training with spans and without, pair by pair.

round 1: unlocked, unlocked-bare    round 2: unlocked-bare, unlocked    ...    a drift of the machine cancels out
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import comb

__all__ = ["PAIR", "cost_of_spans", "median_interval"]

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
