"""From what the workers did when to the figures of a report, with spans laid out as the diagram they come from.

Every cell is one millisecond: what a stage does (the letters below) and the batch it does it with.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.measurements import measure
from pipeline.metrics.spans import SPAN_DTYPE, Span, Spans

LETTERS = {
    ".": Span.WAIT,
    ":": Span.OTHER,
    "L": Span.LOAD,
    "<": Span.RECEIVE,
    "F": Span.FORWARD,
    "D": Span.DNI,
    "B": Span.BACKWARD,
    "S": Span.STEP,
    ">": Span.SEND,
    "T": Span.DNI_TRAIN,
    "R": Span.RELAY,
    "E": Span.EVALUATE,
}
MS_NS = 1_000_000
BEGIN_NS = 123 * MS_NS
GROUPS = {"forward", "backward", "dni", "relay", "communication", "load", "evaluate", "waiting", "other"}

# warm-up: batch 0      | the window: ms 8 to 22, from the end of S0 to the end of S3 in the last stage
STAGE_0 = "L0 F0 D0 B0 S0 : L1 F1 D1 B1 S1 T0 F2 D2 B2 S2 T1 F3 D3 B3 S3 T2 >2"
STAGE_1 = ".  .  <0 F0 F0 B0 B0 S0 <1 F1 B1 S1 .  <2 F2 B2 S2 .  .  F3 B3 S3 >3"


def _spans(diagram: str, queues: str = "") -> Spans:
    """Spans as a worker would have recorded them: equal neighbours are one span; the end is one more record.

    Args:
        diagram: one cell per millisecond.
        queues: the depth of the activation queue at each forward pass, in order.
    """
    cells, depths = diagram.split(), iter(queues.split())
    records: list[tuple[int, int, int, int]] = []
    for index, cell in enumerate(cells):
        if index and cell == cells[index - 1] and cell[1:]:
            continue
        kind = LETTERS[cell[0]]
        queue = int(next(depths, -1)) if kind is Span.FORWARD else -1
        records.append((int(kind), int(cell[1:] or -1), queue, BEGIN_NS + index * MS_NS))
    records.append((int(Span.OTHER), -1, -1, BEGIN_NS + len(cells) * MS_NS))
    return Spans(np.array(records, dtype=SPAN_DTYPE))


# ---------------------------------------------------------------- one worker


def test_spans_read_back() -> None:
    spans = _spans("F0 F0 B0 . . F1 B1")
    assert spans.span.tolist() == [Span.FORWARD, Span.BACKWARD, Span.WAIT, Span.WAIT, Span.FORWARD, Span.BACKWARD]
    assert spans.batch.tolist() == [0, 0, -1, -1, 1, 1]
    assert len(spans) == 6
    assert spans.seconds() == pytest.approx(7e-3)
    assert spans.seconds(Span.FORWARD) == pytest.approx(3e-3)
    assert spans.seconds(Span.FORWARD, Span.WAIT) == pytest.approx(5e-3)
    assert spans.share(Span.WAIT) == pytest.approx(2 / 7)


def test_a_window_cuts_the_spans_at_its_edges() -> None:
    spans = _spans("F0 F0 F0 . B0 B0")
    part = spans.within(BEGIN_NS + MS_NS, BEGIN_NS + 4 * MS_NS + MS_NS // 2)
    assert part.seconds(Span.FORWARD) == pytest.approx(2e-3)
    assert part.seconds(Span.WAIT) == pytest.approx(1e-3)
    assert part.seconds(Span.BACKWARD) == pytest.approx(0.5e-3)
    assert len(spans.within(0, BEGIN_NS)) == len(spans.within(BEGIN_NS + 6 * MS_NS, 1 << 60)) == 0


def test_no_spans_have_no_share() -> None:
    assert _spans("F0").within(0, 1).share(Span.FORWARD) == 0.0


def test_first_start_and_last_end_of_a_batch() -> None:
    spans = _spans("F0 B0 F1 B0 F0")
    assert spans.first_start(Span.FORWARD) == {0: BEGIN_NS, 1: BEGIN_NS + 2 * MS_NS}
    assert spans.last_end(Span.FORWARD) == {1: BEGIN_NS + 3 * MS_NS, 0: BEGIN_NS + 5 * MS_NS}
    assert spans.last_end(Span.RELAY) == {}


def test_update_latency_is_from_the_end_of_the_forward_to_the_end_of_the_step() -> None:
    """Batch 2 is not updated within the diagram."""
    assert _spans("F0 S0 F1 . B1 B1 S1 F2").update_latencies_s() == pytest.approx([1e-3, 4e-3])


def test_gradient_age_counts_the_updates_since_the_forward_of_its_batch() -> None:
    #                       forward of 0 ends | S0   S1      S2 | arrival of 0's gradient: three updates, 6 ms
    updates, seconds = _spans("F0             S0 F1 S1 F2 F2 S2 T0 T1 F3 S3 T3").gradient_ages()
    assert updates.tolist() == [3, 2, 1]
    assert seconds == pytest.approx([6e-3, 5e-3, 1e-3])


def test_gradient_age_of_a_locked_stage_does_not_apply() -> None:
    updates, seconds = _spans("F0 . . B0 S0 F1 . . B1 S1").gradient_ages()
    assert (len(updates), len(seconds)) == (0, 0)


# ---------------------------------------------------------------- a run


def test_throughput_counts_the_batches_that_come_out_after_the_warm_up() -> None:
    """The last stage ends batch 0 at 8 ms and batch 3 at 22 ms: three batches in 14 ms."""
    measured = measure([_spans(STAGE_0), _spans(STAGE_1)], warmup=1)
    assert measured.batches == 3
    assert measured.seconds == pytest.approx(14e-3)
    assert measured.samples_per_s(batch_rows=7) == pytest.approx(21 / 14e-3)


def test_shares_are_what_lies_in_the_window() -> None:
    below, above = measure([_spans(STAGE_0), _spans(STAGE_1)], warmup=1).stages
    assert below.shares == pytest.approx(
        {
            "forward": 2 / 14,
            "backward": 6 / 14,
            "dni": 6 / 14,
            "relay": 0,
            "communication": 0,
            "load": 0,
            "evaluate": 0,
            "waiting": 0,
            "other": 0,
        }
    )
    assert above.shares == pytest.approx(
        {
            "forward": 3 / 14,
            "backward": 6 / 14,
            "dni": 0,
            "relay": 0,
            "communication": 2 / 14,
            "load": 0,
            "evaluate": 0,
            "waiting": 3 / 14,
            "other": 0,
        }
    )
    assert below.busy == pytest.approx(1.0)
    assert above.busy == pytest.approx(11 / 14)


def test_every_kind_of_span_belongs_to_one_group() -> None:
    """One millisecond of everything between the two steps of the last stage."""
    (stage,) = measure([_spans("F0 S0 . : L1 <1 F1 D1 B1 >1 T0 R0 E0 S1")], warmup=1).stages
    assert stage.shares.keys() == GROUPS
    ms = {name: round(12 * share) for name, share in stage.shares.items()}
    assert ms == {**dict.fromkeys(GROUPS, 1), "backward": 2, "dni": 2, "communication": 2}


def test_update_latency_and_gradient_age_leave_out_the_warm_up() -> None:
    """Read off the diagram: below, 3 ms from forward to update; gradients 2 updates and 8 ms old."""
    below, above = measure([_spans(STAGE_0), _spans(STAGE_1)], warmup=1).stages
    assert below.update_latency_s == pytest.approx((3e-3, 3e-3))
    assert above.update_latency_s == pytest.approx((2e-3, 2e-3))
    assert below.gradient_age_updates == (2.0, 2.0)
    assert below.gradient_age_s == pytest.approx((8e-3, 8e-3))
    assert above.gradient_age_updates is None
    assert above.gradient_age_s is None


def test_a_slow_first_batch_leaves_no_trace() -> None:
    """The largest gradient age once was that of the very first batch, however long the warm-up."""
    start = "F0 . . . . S0 F1 S1 F2 S2 T0 "
    (stage,) = measure([_spans(start + "T1 F3 S3 T2 F4 S4 T3 F5 S5")], warmup=1).stages
    assert stage.update_latency_s == pytest.approx((1e-3, 1e-3))
    assert stage.gradient_age_updates == (2.0, 2.0)
    (late,) = measure([_spans(start + "T1 F3 S3 T2 F4 S4 T3 F5 S5")], warmup=3).stages
    assert late.gradient_age_updates == (2.0, 2.0)
    assert late.gradient_age_s == pytest.approx((4e-3, 4e-3))


def test_percentiles() -> None:
    """Latencies of 1 to 5 ms behind the warm-up: p50 3 ms, p99 just below 5."""
    waits = " ".join(f"F{b} " + ". " * (b - 1) + f"S{b}" for b in range(1, 6))
    (stage,) = measure([_spans(f"F0 S0 {waits}")], warmup=1).stages
    assert stage.update_latency_s == pytest.approx((3e-3, 4.96e-3))


def test_queue_depth_is_that_of_the_forward_passes_that_count() -> None:
    measured = measure([_spans(STAGE_0), _spans(STAGE_1, queues="4 1 2 0")], warmup=1)
    below, above = measured.stages
    assert below.queue_depth is None, "the first stage has no queue"
    assert above.queue_depth == (1.0, 2.0)
    assert measured.queue_depth == {"median": [None, 1.0], "max": [None, 2.0]}


def test_bytes_moved_are_means_over_all_batches_and_rates_in_the_window() -> None:
    """Four batches in all; three of them in a window of 14 ms."""
    measured = measure([_spans(STAGE_0), _spans(STAGE_1)], warmup=1, sent_bytes=[(4000, 0), (0, 3000)])
    assert measured.bytes_moved == {
        "down_bytes_per_batch": [1000.0, 0.0],
        "up_bytes_per_batch": [0.0, 750.0],
        "down_mb_per_s": [pytest.approx(3 * 1000 / 14e-3 / 1e6), 0.0],
        "up_mb_per_s": [0.0, pytest.approx(3 * 750 / 14e-3 / 1e6)],
    }
    assert measure([_spans(STAGE_0), _spans(STAGE_1)], warmup=1).bytes_moved is None, "nobody counted"


def test_a_window_that_the_last_stage_took_itself_is_that_of_all_figures() -> None:
    """It begins half a step after the end of S0, ms 8, and lasts until half a step before that of S3, ms 22."""
    window_ns = BEGIN_NS + 8 * MS_NS + MS_NS // 2, BEGIN_NS + 22 * MS_NS - MS_NS // 2
    measured = measure([_spans(STAGE_0), _spans(STAGE_1)], 1, [(4000, 0), (0, 3000)], window_ns)
    assert (measured.batches, measured.seconds) == (3, pytest.approx(13e-3))
    assert measured.bytes_moved is not None
    assert measured.bytes_moved["down_mb_per_s"] == [pytest.approx(3 * 1000 / 13e-3 / 1e6), 0.0]
    below, above = measured.stages
    assert above.shares["backward"] == pytest.approx(5.5 / 13), "B1 S1 B2 S2 B3 and half of S3"
    assert sum(below.shares.values()) == pytest.approx(1)


def test_a_longer_warm_up_makes_a_shorter_window() -> None:
    stages = [_spans(STAGE_0), _spans(STAGE_1)]
    assert [measure(stages, warmup).batches for warmup in (1, 2, 3)] == [3, 2, 1]
    assert measure(stages, 3).seconds == pytest.approx(5e-3)


@pytest.mark.parametrize("warmup", [0, 4, 9])
def test_at_least_one_batch_must_count(warmup: int) -> None:
    with pytest.raises(ValueError, match=f"4 batches and {warmup} of warm-up: at least one must count."):
        measure([_spans(STAGE_0), _spans(STAGE_1)], warmup)


def test_figures_can_be_written_as_json() -> None:
    measured = measure([_spans(STAGE_0), _spans(STAGE_1)], warmup=1)
    values = json.loads(json.dumps(asdict(measured)))
    assert values["batches"] == 3
    assert values["stages"][0]["shares"].keys() == GROUPS


with_batch = [f"{letter}{batch}" for letter in LETTERS if letter not in ".:" for batch in range(4)]


@settings(deadline=None, max_examples=100)
@given(diagram=st.lists(st.sampled_from([*with_batch, ".", ":"]), max_size=60), warmup=st.integers(1, 2))
def test_shares_add_up_to_1_whatever_a_worker_did(diagram: list[str], warmup: int) -> None:
    text = " ".join(["F0 S0 F1 S1", *diagram, "F9 S9"])
    measured = measure([_spans(text)], warmup)
    (stage,) = measured.stages
    assert math.isclose(sum(stage.shares.values()), 1.0, rel_tol=1e-9)
    assert min(stage.shares.values()) >= 0
    assert stage.busy == pytest.approx(1 - stage.shares["waiting"])
