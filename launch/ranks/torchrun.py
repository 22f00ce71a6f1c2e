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
from multiprocessing import Pipe
from pathlib import Path

from launch.bench.where_rows_run import Site
from launch.options.options import BenchOptions, Parsed, RunOptions, parse
from launch.options.ray_options import check_no_launcher
from launch.ranks.agreement import assignment, preparing, profile, resolved_on
from launch.ranks.bench_driver import Coordinator, OwnPart
from launch.ranks.bench_rank import take_part
from launch.setup.rank import MEET_WITHIN_S, Asked, Rank
from launch.training import Launcher, Working
from pipeline import PlanError, Recipe
from pipeline.run.resolved import Resolved
from workers.supervision.protocol import ControlSocket, Hello
from workers.supervision.rank_agent import DriverGone, serve
from workers.supervision.remote_workers import RemoteWorkers
from workers.wiring.edges import rendezvous

__all__ = ["BenchesRun", "TrainsRun", "bench_on_ranks", "train_on_ranks"]

TrainsRun = Callable[[str, list[str], Parsed, Resolved, Launcher], int]
"""(recipe, arguments, what they say, the resolved plan, who starts the workers) -> exit status."""
BenchesRun = Callable[[str, list[str], Parsed, Site], int]
"""(recipe, arguments, what they say, where the rows run) -> exit status."""
_Part = Callable[[ControlSocket, Parsed | None, list[str], Asked], int]
"""(wire to rank 0, what was understood, or why nothing was, whether to end) -> exit status."""


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
    if rank.index == 0:
        return _drive(rank, recipe, arguments, trained)

    def part(wire: ControlSocket, parsed: Parsed | None, problems: list[str], asked: Asked) -> int:
        return serve(wire, rank.hello(problems), preparing(rank.index, parsed), asked)

    return _follow(rank, partial(_parsed, rank, recipe, arguments), part)


def bench_on_ranks(rank: Rank, recipe: str, arguments: list[str], benched: BenchesRun) -> int:
    """This rank's part of ``freewheel bench``; arguments, errors and blocking as with ``train_on_ranks``.

    Args:
        rank: this process.
        recipe: name or path.
        arguments: the options.
        benched: on rank 0 runs the rows and shows what came out.
    """
    if rank.index == 0:
        return _coordinate(rank, recipe, arguments, benched)

    def part(wire: ControlSocket, parsed: Parsed | None, problems: list[str], asked: Asked) -> int:
        prepare, call = partial(preparing, rank.index), partial(rank.call, asked)
        return take_part(wire, partial(rank.hello, problems), parsed, prepare, call, asked)

    return _follow(rank, partial(_parsed_for_bench, rank, recipe, arguments), part)


def _drive(rank: Rank, recipe: str, arguments: list[str], trained: TrainsRun) -> int:
    with rank.reception() as reception:
        parsed = _parsed(rank, recipe, arguments)
        asked = Asked()
        mine, agents = (ControlSocket(end) for end in Pipe())
        fleet = RemoteWorkers(rank.world, asked)
        atexit.register(fleet.hang_up)  # no rank may exit before this one has said why
        with fleet:
            agreed: list[Resolved] = []
            own = threading.Thread(
                target=_own_agent, args=(agents, rank.hello(), parsed, agreed, asked), name="agent", daemon=True
            )
            own.start()
            fleet.gather(mine, reception, MEET_WITHIN_S)
            resolved = resolved_on(fleet.hosts, parsed.source, parsed.plan, gpus=fleet.gpus)
            agreed.append(resolved)
            with rendezvous(resolved, reception.host) as meeting:
                fleet.prepare(resolved, (meeting.host, meeting.port) if meeting else None, profile(resolved))
                return trained(recipe, arguments, parsed, resolved, Launcher("torchrun", _working(fleet)))


def _coordinate(rank: Rank, recipe: str, arguments: list[str], benched: BenchesRun) -> int:
    with rank.reception() as reception:
        parsed = _parsed_for_bench(rank, recipe, arguments)
        asked, own = Asked(), OwnPart()
        mine, theirs = (ControlSocket(end) for end in Pipe())
        fleet = RemoteWorkers(rank.world, asked)
        atexit.register(fleet.hang_up)  # no rank may exit before this one has said why
        with fleet:
            thread = threading.Thread(
                target=_own_part, args=(theirs, rank.hello, parsed, own, asked), name="participant", daemon=True
            )
            thread.start()
            fleet.gather(mine, reception, MEET_WITHIN_S)
            coordinator = Coordinator(parsed, fleet, reception, partial(RemoteWorkers, rank.world, asked), own)
            site = coordinator.site("torchrun", partial(resolved_on, fleet.hosts, gpus=fleet.gpus))
            return benched(recipe, arguments, parsed, site)


def _follow(rank: Rank, parse: Callable[[], Parsed], part: _Part) -> int:
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
        with contextlib.closing(rank.call(asked)) as wire:
            return part(wire, parsed, problems, asked)
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


def _working(
    fleet: RemoteWorkers,
) -> Callable[[Callable[[], Recipe], Resolved, Path], contextlib.AbstractContextManager[Working]]:
    @contextlib.contextmanager
    def working(source: Callable[[], Recipe], resolved: Resolved, run_dir: Path) -> Iterator[Working]:
        yield fleet.run(run_dir), fleet.end_early

    return working


def _own_part(
    wire: ControlSocket, hello: Callable[[], Hello], parsed: Parsed, own: OwnPart, asked: Callable[[], bool]
) -> None:
    """The participant in the coordinator's process."""
    with contextlib.suppress(DriverGone):
        take_part(wire, hello, parsed, own.prepare, own.call, asked)


def _own_agent(
    wire: ControlSocket, hello: Hello, parsed: Parsed, agreed: Sequence[Resolved], asked: Callable[[], bool]
) -> None:
    """The agent in the driver's process: it needs not resolve again what the driver has."""
    with contextlib.suppress(DriverGone):
        serve(wire, hello, lambda task: assignment(0, parsed, agreed[0], task), asked)
