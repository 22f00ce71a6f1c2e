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
import io
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from launch.bench.where_rows_run import Site
from launch.options.options import BenchOptions, Parsed, RunOptions, parse
from launch.options.ray_options import check_no_launcher
from launch.ranks.agreement import OwnPart, PrepareTask, preparing, profile, resolved_on
from launch.ranks.bench_driver import Coordinator, working_on
from launch.ranks.bench_rank import take_part
from launch.setup.rank import MEET_WITHIN_S, Asked, Rank, memory
from launch.training import Launcher
from pipeline import PlanError
from pipeline.run.resolved import Resolved
from workers.supervision.control_records import Hello
from workers.supervision.control_socket import ControlSocket, connect_to
from workers.supervision.driver_connection import DriverGone
from workers.supervision.rank_agent import serve
from workers.supervision.remote_workers import RemoteWorkers

__all__ = ["BenchesRun", "TrainsRun", "bench_on_ranks", "train_on_ranks"]

TrainsRun = Callable[[str, list[str], Parsed, Resolved, Launcher], int]
"""(recipe, arguments, what they say, the resolved plan, who starts the workers) -> exit status."""
BenchesRun = Callable[[str, list[str], Parsed, Site], int]
"""(recipe, arguments, what they say, where the rows run) -> exit status."""
_TakesPart = Callable[
    [
        ControlSocket,
        Callable[[], Hello],
        Parsed | None,
        PrepareTask,
        Callable[[], ControlSocket],
        Callable[[], bool],
    ],
    int,
]
"""See ``launch.ranks.bench_rank.take_part``."""


def train_on_ranks(rank: Rank, recipe: str, arguments: list[str], trained: TrainsRun) -> int:
    """This rank's part of ``freewheel train``.

    Args:
        rank: this process.
        recipe: name or path.
        arguments: the options; without ``--stages`` there are as many as ranks, shared out to the replicas.
        trained: on rank 0 runs the training and shows what came out.

    Returns:
        the exit status.

    Raises:
        PlanError: on rank 0: something cannot run, on whichever rank; no worker was started.
        RunFailed: on rank 0: a worker or a rank failed; everything was stopped and cleaned up.
        KeyboardInterrupt: a rank was asked to end.

    Blocks:
        until the training is over.
    """
    parse = partial(_parsed, rank, recipe, arguments)
    if rank.index:
        return _follow(rank, parse, _train)
    with _gathered(rank, parse, _train) as (parsed, workers, own):
        gpus = [hello.gpus for hello in workers.hellos]
        own.resolved = resolved = resolved_on(workers.hosts, parsed.source, parsed.plan, gpus=gpus)
        with workers.prepared(resolved, profile(resolved)):
            return trained(recipe, arguments, parsed, resolved, Launcher("torchrun", working_on(workers)))


def bench_on_ranks(rank: Rank, recipe: str, arguments: list[str], benched: BenchesRun) -> int:
    """This rank's part of ``freewheel bench``; arguments, errors and blocking as with ``train_on_ranks``.

    Args:
        rank: this process.
        recipe: name or path.
        arguments: the options.
        benched: on rank 0 runs the rows and shows what came out.
    """
    parse = partial(_parsed_for_bench, rank, recipe, arguments)
    if rank.index:
        return _follow(rank, parse, take_part)
    with _gathered(rank, parse, take_part) as (parsed, workers, own):
        gpus = [hello.gpus for hello in workers.hellos]
        resolve = partial(resolved_on, workers.hosts, gpus=gpus)
        return benched(recipe, arguments, parsed, Coordinator(parsed, workers, own).site("torchrun", resolve))


def _train(
    wire: ControlSocket,
    hello: Callable[[], Hello],
    parsed: Parsed | None,
    prepare: PrepareTask,
    call: Callable[[], ControlSocket],
    asked: Callable[[], bool],
) -> int:
    """As `take_part`, in one training run."""
    return serve(wire, hello(), prepare(parsed), asked)


@contextlib.contextmanager
def _gathered(
    rank: Rank, parse: Callable[[], Parsed], takes_part: _TakesPart
) -> Iterator[tuple[Parsed, RemoteWorkers, OwnPart]]:
    """Rank 0: the agents of all ranks, that of this process included, which is a thread."""
    with rank.reception() as reception:
        parsed, asked, own = parse(), Asked(), OwnPart()
        call = partial(connect_to, reception.host, reception.port, reception.key, MEET_WITHIN_S)

        def take_own_part() -> None:
            with contextlib.suppress(DriverGone), contextlib.closing(call()) as wire:
                takes_part(wire, rank.hello, parsed, own.prepare, call, asked)

        workers = RemoteWorkers(rank.world, asked)
        atexit.register(workers.hang_up)  # no rank may exit before this one has said why
        with workers:
            threading.Thread(target=take_own_part, name="agent", daemon=True).start()
            workers.gather(reception, MEET_WITHIN_S, memory())
            yield parsed, workers, own


def _follow(rank: Rank, parse: Callable[[], Parsed], takes_part: _TakesPart) -> int:
    """A rank other than 0: understand what rank 0 has understood, then take part."""
    problems: list[str] = []
    parsed: Parsed | None = None
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):  # rank 0 says the same
            parsed = parse()
    except PlanError as error:
        problems = list(error.problems)
    except SystemExit as ended:
        if not ended.code:
            return 0
        problems = [f"it refuses the options: {' '.join(said.getvalue().split())}"]
    asked = Asked()
    try:
        call = partial(rank.call, asked)
        with contextlib.closing(call()) as wire:
            hello, prepare = partial(rank.hello, problems), partial(preparing, rank.index)
            return takes_part(wire, hello, parsed, prepare, call, asked)
    except (DriverGone, TimeoutError) as gone:
        if not (asked() or problems) and getattr(gone, "told", True):
            print(f"freewheel: rank {rank.index} on {socket.gethostname()}: {gone}", file=sys.stderr)
        return 1


def _parsed(
    rank: Rank,
    recipe: str,
    arguments: list[str],
    options: type[RunOptions] = RunOptions,
    prog: str = "freewheel train",
) -> Parsed:
    """The options, with one stage (of one replica) per rank."""
    check_no_launcher(arguments, "torchrun starts the ranks, one per stage: leave it out, or start without torchrun.")
    given = any(argument.partition("=")[0] == "--stages" for argument in arguments)
    stages = [] if given else ["--stages", str(max(1, rank.world // _replicas(arguments)))]
    parsed = parse(recipe, [*arguments, *stages], options, prog)
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
