"""``torchrun ... -m launch bench``: our modes and the rivals over the same ranks, told once, nothing left behind."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from torchrun_program import HERE, torchrun

pytestmark = pytest.mark.processes
HOST = socket.gethostname()


@pytest.mark.timeout(300)
def test_all_rows_run_over_the_ranks_and_the_report_is_complete(tmp_path: Path) -> None:
    """One of our modes, unlocked, data parallel training and one of torch's schedules; one rank speaks.

    Batches of 14 rows leave 1F1B on two ranks one possible number of microbatches, which makes its search short.
    """
    typed = "bench digits --hidden 32 --batch 14 --rows naive unlocked ddp torch-1f1b --steps 6 --rounds 1"
    with torchrun(f"{typed} --runs . --name b --json b.json", tmp_path) as program:
        status, out, err = program.ended(within_s=240.0)
    assert status == 0, err
    assert "freewheel" not in err
    assert out.count("digits: unlocked, 2 stages, 6 batches of 14") == 1
    assert "Unlocked, 2 stages: throughput" in out
    report = json.loads((tmp_path / "b.json").read_text())
    assert report == json.loads((tmp_path / "b" / "bench.json").read_text())
    assert report["environment"]["hosts"] == [HOST, HOST]
    assert report["command"][:3] == ["freewheel", "bench", "digits"]
    assert report["left_out"] == {}
    assert [stage["stage"] for stage in report["quality"]] == [0]
    rows = report["rows"]
    assert [(row["engine"], row["mode"], row["microbatches"]) for row in rows] == [
        ("single", "backprop", None),
        ("ddp", "backprop", None),
        ("torch", "1F1B", 2),
        ("freewheel", "naive", None),
        ("freewheel", "unlocked", None),
    ]
    for row in rows:
        assert row["launcher"] == "torchrun"
        assert row["samples_per_s"]["median"] > 0
        assert len(row["peak_memory_bytes"]) == row["stages"]
        assert (row["busy_share"] is not None) == (row["engine"] == "freewheel")
        assert 0 <= row["accuracy"] <= 1, "held-out data was looked at"
    assert [row["loss"] for row in rows[:4]] == pytest.approx([rows[0]["loss"]] * 4, abs=1e-4), "the same batches"


def test_a_failing_rival_is_told_once_with_rank_and_host(tmp_path: Path) -> None:
    with torchrun(f"bench {HERE / 'fails_on_rank_1.py'} --rows ddp --rounds 1 --runs . --name b", tmp_path) as program:
        status, _, err = program.ended()
    assert status != 0
    (line,) = [line for line in err.splitlines() if line.startswith("freewheel: ")]
    assert line == f"freewheel: DDP: rank 1 of 2 on {HOST} failed: ZeroDivisionError: as planned"
    assert err.count('raise ZeroDivisionError("as planned")') == 1, "its traceback"
    assert err.index(line) < err.index("ChildFailedError"), "ours comes before torchrun's summary"


def test_a_rank_that_is_killed_while_it_waits_ends_the_benchmark(tmp_path: Path) -> None:
    """The row of one process trains on rank 0; rank 1 has nothing to do. Its fork server tidies up behind it."""
    typed = f"bench {HERE / 'fails_on_rank_1.py'} --rows ddp --steps 10000000 --runs . --name b"
    with torchrun(typed, tmp_path) as program:
        program.wait_for("pass 5")
        program.rank(1).kill()
        status, _, err = program.ended()
    assert status != 0
    (line,) = [line for line in err.splitlines() if line.startswith("freewheel: ")]
    assert line.startswith("freewheel: stage 1: rank 1 (pid ")
    assert f" on {HOST}) is gone without a word (" in line
