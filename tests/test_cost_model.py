"""The cost model knows what each policy ought to reach."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline import Plan
from pipeline.run.cost_model import predicted_batches_per_s


def _rate(**plan: Any) -> float:
    rate = predicted_batches_per_s(Plan(steps=200, **plan), warmup=20)
    assert rate is not None
    return rate


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_by_hand(stages: int) -> None:
    """10 ms a stage: naive takes K stage times, 1F1B over m microbatches 1 + (K - 1) / m, unlocked one."""
    assert _rate(stages=stages, mode="naive", emulate="stage_ms=10") == pytest.approx(100 / stages, rel=1e-3)
    assert _rate(stages=stages, emulate="stage_ms=10") == pytest.approx(100, rel=1e-3)
    parts = _rate(stages=stages, mode="1f1b", microbatches=8, emulate="stage_ms=10")
    assert parts == pytest.approx(100 * 8 / (8 + stages - 1), rel=1e-2)


def test_a_link_delays_the_locked_modes_only() -> None:
    """K = 4, 10 ms a stage, 50 ms a hop: naive waits for six hops."""
    link = {"stages": 4, "emulate": "stage_ms=10", "link": "latency_ms=50"}
    assert _rate(mode="naive", **link) == pytest.approx(1000 / (4 * 10 + 6 * 50), rel=1e-3)
    assert _rate(**link) == pytest.approx(100, rel=1e-3)


def test_the_dni_costs_its_time() -> None:
    assert _rate(stages=2, emulate="stage_ms=10,dni_ms=1") == pytest.approx(1000 / 11, rel=2e-2)


def test_what_it_cannot_say() -> None:
    assert predicted_batches_per_s(Plan(steps=20), warmup=2) is None
    assert predicted_batches_per_s(Plan(steps=20, emulate="stage_ms=1", link="bandwidth_mbps=10"), warmup=2) is None
