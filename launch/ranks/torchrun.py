"""``train`` and ``bench`` under torchrun: one stage per rank, on one host or several. Rank 0 is the driver as well.

    torchrun --nproc-per-node 2 -m freewheel train digits

    rank 0    driver: console, run folder, verdict       agent -> worker of stage 0
    rank 1                                               agent -> worker of stage 1

    bench: the same, row by row; the driver is the coordinator, and in every rank a participant waits for its turns

All ranks have the same arguments, and each loads the recipe by itself. Rank 0 decides what is open, such as the split
by measured time, and the others check that they see the same.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from launch.bench.where_rows_run import Site
from launch.options.options import BenchOptions, Parsed, RunOptions, option_name, parse
from launch.options.ray_options import check_no_launcher
from launch.ranks.agreement import OwnPart, prepare_task, profile, resolved_on
from launch.ranks.bench_driver import Coordinator
from launch.ranks.bench_rank import take_part
from launch.ranks.part import RankPart, TakesPart, understood
from launch.setup.rank import MEET_WITHIN_S, Rank, held_back_signals, memory
from launch.training import Launcher, Working
from pipeline import PlanError
from pipeline.run.resolved import Resolved
from workers.supervision.control_socket import connect_to
from workers.supervision.driver_connection import DriverGone
from workers.supervision.remote_workers import RemoteWorkers

__all__ = ["BenchesRun", "TrainsRun", "bench_on_ranks", "train_on_ranks"]

TrainsRun = Callable[[str, list[str], Parsed, Resolved, Launcher], int]
"""(recipe, arguments, what they say, the resolved plan, who starts the workers) -> exit status."""
BenchesRun = Callable[[str, list[str], Parsed, Site], int]
"""(recipe, arguments, what they say, where the rows run) -> exit status."""


def train_on_ranks(rank: Rank, recipe: str, arguments: list[str], trained: TrainsRun) -> int:
    """This rank's part of ``freewheel train``; returns the exit status, once the training is over.

    Without ``--stages`` there are as many as ranks, shared out to the replicas. On rank 0 ``trained`` runs the training
    and shows what came out.

    Raises:
        PlanError: on rank 0: something cannot run, on whichever rank; no worker was started.
        RunFailed: on rank 0: a worker or a rank failed; everything was stopped and cleaned up.
        KeyboardInterrupt: a rank was asked to end.
    """
    parse = partial(_parsed, rank, recipe, arguments)
    if rank.index:
        return _follow(rank, parse, RankPart.train)
    with _gathered(rank, parse, RankPart.train) as (parsed, workers, own):
        own.resolved = resolved = resolved_on(workers, parsed.source, parsed.plan)

        def working(source: object, resolved: object, run_dir: Path) -> contextlib.nullcontext[Working]:
            return contextlib.nullcontext((workers.run(run_dir), workers.end_early))

        with workers.prepared(resolved, profile(resolved)):
            return trained(recipe, arguments, parsed, resolved, Launcher("torchrun", working))


def bench_on_ranks(rank: Rank, recipe: str, arguments: list[str], benched: BenchesRun) -> int:
    """This rank's part of ``freewheel bench``, as with ``train_on_ranks``; ``benched`` runs the rows on rank 0."""
    parse = partial(_parsed_for_bench, rank, recipe, arguments)
    if rank.index:
        return _follow(rank, parse, take_part)
    with _gathered(rank, parse, take_part) as (parsed, workers, own):
        site = Coordinator(parsed, workers, own).site("torchrun", partial(resolved_on, workers))
        return benched(recipe, arguments, parsed, site)


@contextlib.contextmanager
def _gathered(
    rank: Rank, parse: Callable[[], Parsed], takes_part: TakesPart
) -> Iterator[tuple[Parsed, RemoteWorkers, OwnPart]]:
    """Rank 0: the agents of all ranks, that of this process included, which is a thread."""
    with rank.reception() as reception:
        parsed, asked, own = parse(), held_back_signals(), OwnPart()
        call = partial(connect_to, reception.host, reception.port, reception.key, MEET_WITHIN_S)
        part = RankPart(rank.hello, parsed, own.prepare, call, asked)

        def take_own_part() -> None:
            with contextlib.suppress(DriverGone), contextlib.closing(call()) as wire:
                takes_part(part, wire)

        workers = RemoteWorkers(rank.world, asked)
        atexit.register(workers.hang_up)  # no rank may exit before this one has said why
        with workers:
            threading.Thread(target=take_own_part, name="agent", daemon=True).start()
            workers.gather(reception, MEET_WITHIN_S, memory())
            yield parsed, workers, own


def _follow(rank: Rank, parse: Callable[[], Parsed], takes_part: TakesPart) -> int:
    """A rank other than 0: understand what rank 0 has understood, then take part."""
    parsed, problems = understood(parse)
    asked = held_back_signals()
    call = partial(rank.call, asked)
    part = RankPart(partial(rank.hello, problems), parsed, partial(prepare_task, rank.index), call, asked)
    try:
        with contextlib.closing(call()) as wire:
            return takes_part(part, wire)
    except (DriverGone, TimeoutError) as gone:
        if not (asked() or problems) and getattr(gone, "told", True):
            print(f"freewheel: rank {rank.index} on {socket.gethostname()}: {gone}", file=sys.stderr)
        return 1


def _parsed(
    rank: Rank, recipe: str, arguments: list[str], options: type[RunOptions] = RunOptions, prog: str = "freewheel train"
) -> Parsed:
    """The options, with one stage (of one replica) per rank."""
    check_no_launcher(arguments, "torchrun starts the ranks, one per stage: leave it out, or start without torchrun.")
    if "stages" not in map(option_name, arguments):
        arguments = [*arguments, "--stages", str(max(1, rank.world // _replicas(arguments)))]
    parsed = parse(recipe, arguments, options, prog)
    plan = parsed.plan
    if plan.workers != rank.world:
        times = f" times {plan.replicas} replicas" if plan.replicas > 1 else ""
        instead = f", or give --stages {rank.world // plan.replicas}" if rank.world % plan.replicas == 0 else ""
        raise PlanError(
            f"{plan.stages} stages{times} for {rank.world} ranks of torchrun: every rank runs one stage; start "
            f"{plan.workers} ranks (--nproc-per-node times --nnodes){instead}."
        )
    return parsed


def _parsed_for_bench(rank: Rank, recipe: str, arguments: list[str]) -> Parsed:
    parsed = _parsed(rank, recipe, arguments, BenchOptions, "freewheel bench")
    if parsed.run.over_stages:
        raise PlanError("over_stages cannot be had under torchrun, where every rank runs one stage: leave it out.")
    return parsed


def _replicas(arguments: Sequence[str]) -> int:
    """What ``--replicas`` says; 1 without it, or where it is no number, which is found later."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name == "--replicas":
            value = value if equals else following
            return max(1, int(value)) if value.isdecimal() else 1
    return 1
