"""The ledger: what a sample costs, in seconds and operations, and the sentences that follow from the figures."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launch.bench.cost_ledger import Account, Work, entry, same_work, seconds_of, show_ledger
from pipeline.metrics.measurements import GROUPS, Measured, StageMeasured
from pipeline.run.flops import StageFlops

US = 1e-6
MFLOP = 1e6
ALONE = Account(
    name="one process",
    seconds=Work(forward=200 * US, backward=400 * US, other=10 * US),
    flop=Work(forward=20 * MFLOP, backward=40 * MFLOP),
    total_s=610 * US,
)
NAIVE = Account(
    name="naive",
    seconds=Work(forward=200 * US, backward=420 * US, communication=20 * US, waiting=640 * US),
    flop=ALONE.flop,
    total_s=1280 * US,
)
UNLOCKED = Account(
    name="unlocked",
    seconds=Work(forward=210 * US, backward=420 * US, dni=35 * US, communication=15 * US, waiting=20 * US),
    flop=Work(forward=20 * MFLOP, backward=40 * MFLOP, dni=0.6 * MFLOP),
    total_s=700 * US,
)
DDP = Account(name="DDP", seconds=None, flop=None, total_s=1500 * US, note="ValueError: no [shape]")


def _stage(**shares: float) -> StageMeasured:
    return StageMeasured({**dict.fromkeys(GROUPS, 0.0), **shares}, None, None, None, None, records=1)


def test_seconds_per_sample_are_summed_over_the_stages() -> None:
    """10 batches of 50 in 2 s: a share of 1 is 4 ms of a sample."""
    stages = _stage(forward=0.5, waiting=0.3, load=0.1, other=0.1), _stage(forward=0.5, dni=0.25, evaluate=0.25)
    work = seconds_of(Measured(batches=10, seconds=2.0, stages=stages), batch_rows=50)
    assert (work.forward, work.waiting, work.dni) == pytest.approx((4e-3, 1.2e-3, 1e-3))
    assert work.other == pytest.approx(1.8e-3), "loading and evaluation are in it"
    assert work.total == pytest.approx(2 * 4e-3), "nothing is lost: two stages, the whole time"


def test_operations_per_sample_are_summed_over_the_stages() -> None:
    stages = StageFlops(forward=100, backward=200, dni=10), StageFlops(forward=50, backward=80, relay=30)
    assert Work.of_flops(stages, 10) == Work(forward=15, backward=28, dni=1, relay=3)


def test_the_entry_of_bench_json() -> None:
    names = ("forward", "backward", "dni", "relay", "communication", "waiting")
    made = entry(UNLOCKED.seconds, UNLOCKED.flop)
    assert made is not None
    assert list(made) == [f"{name}_{unit}" for unit in ("s", "flop") for name in names]
    assert (made["dni_s"], made["dni_flop"]) == pytest.approx((35e-6, 0.6e6))
    assert made["communication_flop"] == made["waiting_flop"] == 0, "moving and waiting compute nothing"
    emulated = entry(UNLOCKED.seconds, None)
    assert emulated is not None
    assert [emulated[f"{name}_flop"] for name in names] == [None] * 6
    assert entry(None, None) is None


def test_is_the_same_work_only_moved_in_time() -> None:
    assert same_work(UNLOCKED, ALONE, NAIVE) == (
        "The same work, only moved in time? Unlocked does 1.0% more operations than one process (DNI +1.0%). "
        "In seconds the DNI is 5.0% of what it spends. "
        "Waiting falls: from 640 us a sample (50% of the workers' time, naive) to 20.0 us (3%)."
    )


def test_every_difference_has_its_name() -> None:
    flop = Work(forward=20 * MFLOP, backward=34 * MFLOP, dni=3 * MFLOP, relay=9 * MFLOP)
    relayed = Account(name="unlocked", seconds=None, flop=flop, total_s=1.0)
    assert same_work(relayed, ALONE, NAIVE) == (
        "The same work, only moved in time? Unlocked does 10.0% more operations than one process "
        "(DNI +5.0%, relay +15.0%, input gradients -10.0%)."
    )


def test_waiting_that_does_not_fall_is_said() -> None:
    sentence = same_work(NAIVE, None, UNLOCKED)
    assert sentence is not None
    assert (
        "Waiting does not fall: from 20.0 us a sample (3% of the workers' time, unlocked) to 640 us (50%)." in sentence
    )


def test_nothing_to_compare_with_no_sentence() -> None:
    assert same_work(UNLOCKED, None, None) is None
    assert same_work(UNLOCKED, DDP, DDP) is None


def test_the_table_fits_into_80_columns_and_says_what_is_not_known() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, highlight=False)
    accounts = [
        ALONE,
        DDP,
        NAIVE,
        UNLOCKED,
        Account(name="torch Int-ZeroBubble x4", seconds=None, flop=None, total_s=1),
    ]
    show_ledger(console, accounts, UNLOCKED, ALONE, NAIVE)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()
    assert sum(line.startswith("us: ") for line in lines) == 1
    cells = {line.split("  ")[0]: line.split() for line in lines}
    assert cells["unlocked"][1:] == ["us", "210", "420", "35.0", "0", "15.0", "20.0", "0", "700"]
    below = lines[next(n for n, line in enumerate(lines) if line.startswith("unlocked")) + 1]
    assert below.split() == ["Mflop", "20.0", "40.0", "0.600", "0", "0", "0", "0", "60.6"]
    assert cells["DDP"][1:] == ["us", *["-"] * 7, "1,500"], "no operations, no line of them"
    assert "  not counted: DDP  (ValueError: no [shape])" in lines
    assert "more operations than one process" in " ".join(lines)
