"""``train`` under torchrun: one stage per rank, on one host or several. Rank 0 is the driver as well.

    torchrun --nproc-per-node 2 -m launch train digits

    rank 0    driver: console, run folder, verdict       agent -> worker of stage 0
    rank 1                                               agent -> worker of stage 1

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
from multiprocessing import Pipe
from pathlib import Path

from launch.agreement import assignment, preparing, profile
from launch.options import Parsed, RunOptions, parse
from launch.ranks import MEET_WITHIN_S, Asked, Rank
from launch.training import Launcher, Working, resolve_source
from pipeline import PlanError, Recipe
from pipeline.resolve import Resolved
from workers.agent import DriverGone, serve
from workers.control import Hello, Wire
from workers.edges import rendezvous
from workers.fleet import Fleet

__all__ = ["train"]

Trained = Callable[[str, list[str], Parsed, Resolved, Launcher], int]
"""(recipe, arguments, what they say, the resolved plan, who starts the workers) -> exit status."""


def train(rank: Rank, recipe: str, arguments: list[str], trained: Trained) -> int:
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
    drives = rank.index == 0
    return _drive(rank, recipe, arguments, trained) if drives else _follow(rank, recipe, arguments)


def _drive(rank: Rank, recipe: str, arguments: list[str], trained: Trained) -> int:
    with rank.reception() as reception:
        parsed = _parsed(rank, recipe, arguments)
        asked = Asked()
        mine, agents = (Wire(end) for end in Pipe())
        fleet = Fleet(rank.world, asked)
        atexit.register(fleet.hang_up)  # no rank may exit before this one has said why
        with fleet:
            agreed: list[Resolved] = []
            own = threading.Thread(
                target=_own_agent, args=(agents, rank.hello(), parsed, agreed, asked), name="agent", daemon=True
            )
            own.start()
            fleet.gather(mine, reception, MEET_WITHIN_S)
            hosts = fleet.hosts
            if parsed.plan.link is not None and len(set(hosts)) > 1:
                raise PlanError("link delays messages by the clock of one host, and there are several: leave it out.")
            resolved = resolve_source(parsed.source, parsed.plan, hosts)
            agreed.append(resolved)
            with rendezvous(resolved, reception.host) as meeting:
                fleet.prepare(resolved, (meeting.host, meeting.port) if meeting else None, profile(resolved))
                return trained(recipe, arguments, parsed, resolved, Launcher("torchrun", _working(fleet)))


def _follow(rank: Rank, recipe: str, arguments: list[str]) -> int:
    problems: list[str] = []
    parsed: Parsed | None = None
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):  # rank 0 says the same
            parsed = _parsed(rank, recipe, arguments)
    except PlanError as error:
        problems = list(error.problems)
    except SystemExit as ended:
        if not ended.code:
            return 0
        problems = [f"it refuses the options: {' '.join(said.getvalue().split())}"]
    asked = Asked()
    try:
        with contextlib.closing(rank.call(asked)) as wire:
            return serve(wire, rank.hello(problems), preparing(rank.index, parsed), asked)
    except (DriverGone, TimeoutError) as gone:
        if not (asked() or problems) and getattr(gone, "told", True):
            print(f"freewheel: rank {rank.index} on {socket.gethostname()}: {gone}", file=sys.stderr)
        return 1


def _parsed(rank: Rank, recipe: str, arguments: list[str]) -> Parsed:
    """The options, with one stage (of one replica) per rank."""
    given = any(argument.partition("=")[0] == "--stages" for argument in arguments)
    stages = [] if given else ["--stages", str(max(1, rank.world // _replicas(arguments)))]
    parsed = parse(recipe, [*arguments, *stages], RunOptions, "freewheel train")
    plan = parsed.plan
    if plan.workers != rank.world:
        times = f" times {plan.replicas} replicas" if plan.replicas > 1 else ""
        instead = f", or give --stages {rank.world // plan.replicas}" if rank.world % plan.replicas == 0 else ""
        raise PlanError(
            f"{plan.stages} stages{times} for {rank.world} ranks of torchrun: every rank runs one stage; start "
            f"{plan.workers} ranks (--nproc-per-node times --nnodes){instead}."
        )
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
    fleet: Fleet,
) -> Callable[[Callable[[], Recipe], Resolved, Path], contextlib.AbstractContextManager[Working]]:
    @contextlib.contextmanager
    def working(source: Callable[[], Recipe], resolved: Resolved, run_dir: Path) -> Iterator[Working]:
        yield fleet.run(run_dir), fleet.end_early

    return working


def _own_agent(wire: Wire, hello: Hello, parsed: Parsed, agreed: Sequence[Resolved], asked: Callable[[], bool]) -> None:
    """The agent in the driver's process: it needs not resolve again what the driver has."""
    with contextlib.suppress(DriverGone):
        serve(wire, hello, lambda task: assignment(0, parsed, agreed[0], task), asked)
