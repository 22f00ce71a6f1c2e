"""A benchmark over several ranks without torchrun: the coordinator here, its participants in threads of this process.

Their names for shared memory differ, so that they count as two hosts: messages go over gloo, files by wire.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import problems
import pytest
from oracle import assert_same

from launch.bench.rivals import run_ddp, run_torch_schedule
from launch.bench.single_process import run_single
from launch.bench.where_rows_run import Site
from launch.options.options import Parsed
from launch.ranks.agreement import OwnPart, changed, changes, prepare_task, resolved_on
from launch.ranks.bench_driver import Coordinator
from launch.ranks.bench_rank import take_part
from launch.ranks.part import RankPart
from launch.setup.recipe_source import GivenRecipe
from launch.setup.resolve_source import resolve_source
from launch.show.console import Console
from launch.training import run
from pipeline import ChannelPlan, DNIPlan, OptimizerPlan, Plan, PlanError, Recipe
from workers.channels.shm.ring import new_prefix
from workers.errors import RunFailed
from workers.supervision.control_records import Hello
from workers.supervision.control_socket import ControlSocket, Reception, connect_to
from workers.supervision.driver_connection import DriverGone
from workers.supervision.remote_workers import RemoteWorkers

PLAN = Plan(mode="unlocked", stages=2, sizes=(4, 4), steps=6, evaluate_every=None)
WITHIN_S = 60.0


# ---------------------------------------------------------------- how a plan travels


def _factory(*given: object) -> Any:
    raise AssertionError("nobody builds it here")


@pytest.mark.parametrize(
    "wanted",
    [
        Plan(),
        Plan(mode="1f1b", microbatches=4, sizes=(1, 2), spans=False),
        Plan(until="loss=1", evaluate_every=3, optimizer=OptimizerPlan(rule="sgd", momentum=0.5)),
        Plan(stages=3, channel=ChannelPlan(wire_dtype="bf16", gradient_slots=7), stall_after_s=5.0),
        Plan(dni=DNIPlan(lr=0.5)),
    ],
)
def test_a_plan_is_its_base_and_the_changes(wanted: Plan) -> None:
    base = Plan(steps=100, seed=3, cuts=("1",), dni=DNIPlan(factory=_factory), channel=ChannelPlan(slots=2))
    travelling = json.loads(json.dumps(changes(base, wanted)))
    assert changed(base, travelling) == wanted


def test_what_stays_as_it_is_does_not_travel() -> None:
    """A user's own DNI is code: every rank has it from its own copy of the recipe."""
    base = Plan(dni=DNIPlan(factory=_factory))
    assert changes(base, Plan(steps=7, dni=DNIPlan(factory=_factory, lr=0.5))) == {"steps": 7, "dni": {"lr": 0.5}}


# ---------------------------------------------------------------- a coordinator and two participants


def even() -> Recipe:
    """A classifier whose batches two ranks can share, with held-out data."""
    return replace(problems.recipe(), model=partial(problems.wide, 8, problems.WIDTH), name="even")


@dataclass
class Ranks:
    """Both ranks of a benchmark.

    Attributes:
        asked: whether to end.
        statuses: what the participants have ended with, by rank; the error where they could not.
        wire: of participant 1, for whoever wants to cut it.
    """

    asked: threading.Event = field(default_factory=threading.Event)
    statuses: dict[int, int | Exception] = field(default_factory=dict)
    wire: ControlSocket | None = None


@contextlib.contextmanager
def ranks(
    both: Ranks, source: Callable[[], Recipe], plan: Plan = PLAN, other: Callable[[], Recipe] | None = None
) -> Iterator[Site]:
    """Where rows run; whatever happens, both participants have ended when the block is left.

    ``other``: the recipe that rank 1 sees.
    """
    parsed, own = Parsed(source, plan, None), OwnPart()  # type: ignore[arg-type]
    fleet = RemoteWorkers(2, both.asked.is_set)

    def hello(rank: int) -> Hello:
        return Hello(rank, os.getpid(), f"host-{rank}", f"memory {rank}", new_prefix())

    def part(rank: int, wire: ControlSocket, seen: Parsed, prepare: Any, call: Callable[[], ControlSocket]) -> None:
        try:
            both.statuses[rank] = take_part(RankPart(partial(hello, rank), seen, prepare, call, lambda: False), wire)
        except DriverGone as gone:
            both.statuses[rank] = gone

    with Reception("127.0.0.1") as reception:
        call = partial(connect_to, reception.host, reception.port, reception.key, 5.0)

        def first() -> None:
            with contextlib.closing(call()) as wire:
                part(0, wire, parsed, own.prepare, call)

        def second() -> None:
            with contextlib.closing(call()) as both.wire:
                part(1, both.wire, replace(parsed, source=other or source), partial(prepare_task, 1), call)

        threads = [threading.Thread(target=first), threading.Thread(target=second)]
        for thread in threads:
            thread.start()
        try:
            with fleet:
                fleet.gather(reception, 10.0, "memory 0")
                yield Coordinator(parsed, fleet, own).site("test", partial(resolved_on, fleet))
        finally:
            fleet.hang_up()
            for thread in threads:
                thread.join(20.0)
                assert not thread.is_alive()


@pytest.mark.processes
def test_our_modes_and_rivals_take_turns_and_equal_those_of_one_host(tmp_path: Path) -> None:
    naive, quiet = replace(PLAN, mode="naive"), Console(quiet=True)
    here = resolve_source(even, naive)
    local = run(even, here, tmp_path, "local", quiet, ["test"])
    options: dict[str, Any] = {"threads": 1, "warmup": 1, "within_s": WITHIN_S}
    single = run_single(even, here.plan, **options)
    both = Ranks()
    with ranks(both, even) as site:
        assert site.hosts == ("host-0", "host-1")
        resolved = site.resolve(even, naive)
        site.agree(resolved)
        assert [choice.kind for choice in resolved.channels] == ["gloo"]
        ddp = run_ddp(even, resolved, ranks=2, places=site.places, **options)
        first = run(even, resolved, tmp_path, "first", quiet, ["test"], site.launcher)
        gpipe = run_torch_schedule(even, resolved, "GPipe", microbatches=2, places=site.places, **options)
        again = run(even, resolved, tmp_path, "again", quiet, ["test"], site.launcher)
        unlocked = run(even, site.resolve(even, PLAN), tmp_path, "unlocked", quiet, ["test"], site.launcher)
        site.look()
    for distributed in (first, again):
        assert_same(distributed.state_tensors(), local.state_tensors())
        assert distributed.launcher == "test"
        assert distributed.measured is not None, "the spans of rank 1 came by wire"
    assert unlocked.steps == 6
    assert (ddp.loss, gpipe.loss) == pytest.approx((single.loss, single.loss), abs=1e-5)
    assert both.statuses == {0: 0, 1: 0}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("model", "sizes", "told"),
    [
        (problems.failing, (2, 4), "host-1 failed: ZeroDivisionError: as planned"),
        (partial(problems.suicidal, int(signal.SIGKILL)), (2, 2), "host-1 was killed by SIGKILL"),
    ],
)
def test_a_rival_that_fails_is_named_and_ends_on_all_hosts(model: Any, sizes: tuple[int, ...], told: str) -> None:
    source, plan = GivenRecipe(replace(even(), model=model)), replace(PLAN, mode="naive", sizes=sizes)
    both = Ranks()

    def benchmark() -> None:
        with ranks(both, source, plan) as site:
            options: dict[str, Any] = {"threads": 1, "warmup": 1, "within_s": WITHIN_S, "places": site.places}
            run_torch_schedule(source, site.resolve(source, plan), "GPipe", microbatches=2, **options)

    with pytest.raises(RunFailed) as caught:
        benchmark()
    assert str(caught.value) == f"torch's GPipe: rank 1 of 2 on {told}"
    assert both.statuses == {0: 1, 1: 1}


def test_who_sees_another_recipe_is_refused_before_anything_runs() -> None:
    other = GivenRecipe(replace(even(), model=partial(problems.wide, 9, problems.WIDTH)))
    both = Ranks()

    def benchmark() -> None:
        with ranks(both, even, PLAN, other) as site:
            site.agree(site.resolve(even, PLAN))

    with pytest.raises(PlanError) as caught:
        benchmark()
    assert all(problem.startswith("rank 1 on host-1: ") for problem in caught.value.problems)
    assert both.statuses == {0: 2, 1: 2}


def test_a_participant_that_is_gone_ends_the_benchmark() -> None:
    both = Ranks()

    def benchmark() -> None:
        with ranks(both, even) as site:
            assert both.wire is not None
            with socket.socket(fileno=os.dup(both.wire.fileno())) as connection:
                connection.shutdown(socket.SHUT_RDWR)
            while True:  # the test's own time limit ends it
                site.look()

    with pytest.raises(RunFailed, match=r"stage 1: rank 1 \(pid \d+ on host-1\) is gone without a word"):
        benchmark()
    assert both.statuses[0] == 1
    assert isinstance(both.statuses[1], DriverGone)


def test_whoever_is_asked_to_end_ends_all() -> None:
    both = Ranks()

    def benchmark() -> None:
        with ranks(both, even) as site:
            both.asked.set()
            site.look()

    with pytest.raises(KeyboardInterrupt):
        benchmark()
    assert both.statuses == {0: 130, 1: 130}
