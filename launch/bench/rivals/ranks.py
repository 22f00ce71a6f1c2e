"""A run of a rival: start its ranks, wait for what they found, and end them all, whatever happens.

run_ranks -> places.started -> hear, with a deadline -> one record, or one error     places: this host, or several
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import connection as mp_connection
from typing import Any, Protocol, cast

from launch.bench.rivals.child import ending
from launch.bench.rivals.loop import Rival, Training
from launch.bench.rivals.rank_process import RankProcess, Seat
from launch.bench.rivals.record import Failed, RankRun, RivalRun, Said, merged
from workers.channels.net.gloo import Rendezvous
from workers.errors import RunFailed

__all__ = ["HERE", "Hear", "Places", "run_ranks"]

_LOOK_EVERY_S = 0.5
_AFTERMATH_S = 0.5  # a rank that was killed and a rank that noticed are told apart by waiting for both

Hear = Callable[[float], Mapping[int, Said]]
"""(seconds) -> the last words of the ranks that have ended since; waits at most that long for one."""


class Places(Protocol):
    """Where the ranks of a rival run."""

    def host(self, rank: int) -> str:
        """Name of a rank's host for messages; empty where all are on one."""

    def started(
        self, rival: Rival, training: Training, *, ranks: int, threads: int, within_s: float
    ) -> AbstractContextManager[Hear]:
        """The ranks, each in a fresh process and in a group of their own; all have ended when the block is left."""
        ...


def run_ranks(
    peer: str,
    rival: Rival,
    training: Training,
    *,
    ranks: int,
    threads: int,
    within_s: float,
    places: Places,
    look: Callable[[], None] = lambda: None,
) -> RivalRun:
    """Run ``rival(training, rank)`` in ``ranks`` fresh processes that form one gloo group.

    Blocks until all are over, at most ``within_s``; no process is left, neither after an error. Meanwhile ``look`` is
    called twice a second, and what it raises ends the run. ``peer`` is what the run is called in an error.

    Raises:
        RunFailed: a rank failed or died, with its traceback; or it took too long.
    """
    said: dict[int, Said] = {}
    with places.started(rival, training, ranks=ranks, threads=threads, within_s=within_s) as hear:
        end, failed = time.monotonic() + within_s, False
        while len(said) < ranks and (left := end - time.monotonic()) > 0:
            look()
            said |= hear(min(_LOOK_EVERY_S, left))
            if not failed and any(isinstance(one, Failed) for one in said.values()):
                end, failed = time.monotonic() + _AFTERMATH_S, True
        if failed:
            raise _failure(peer, said, ranks, places)
        if missing := [rank for rank in range(ranks) if rank not in said]:
            which = f"rank {', '.join(map(str, missing))} of {ranks} still ran"
            raise RunFailed(f"{peer} did not end within {within_s:.0f} s: {which}", stage=missing[0])
    return merged([one for _, one in sorted(said.items()) if isinstance(one, RankRun)])


def _failure(peer: str, said: Mapping[int, Said], ranks: int, places: Places) -> RunFailed:
    """A rank that died comes first: the others only saw it go."""
    failed = {rank: word for rank, word in said.items() if isinstance(word, Failed)}
    rank = min(failed, key=lambda rank: (not failed[rank].died, rank))
    host, word = places.host(rank), failed[rank]
    called = f"{peer}: rank {rank} of {ranks}{f' on {host}' if host else ''}" if ranks > 1 else peer
    return RunFailed(f"{called}{'' if word.died else ' failed:'} {word.message}", stage=rank, details=word.trace)


class _Here:
    """Children of this process."""

    def host(self, rank: int) -> str:
        return ""

    @contextmanager
    def started(self, rival: Rival, training: Training, *, ranks: int, threads: int, within_s: float) -> Iterator[Hear]:
        children: list[RankProcess] = []
        with Rendezvous.hosted() as meeting, ending(children):
            for rank in range(ranks):
                children.append(RankProcess(rival, training, Seat(rank, ranks, threads, within_s, meeting)))
            waiting = dict(enumerate(children))

            def hear(within_s: float) -> Mapping[int, Said]:
                ready: Sequence[object] = mp_connection.wait(cast(Any, list(waiting.values())), within_s)
                heard = [rank for rank, one in waiting.items() if one in ready]
                return {rank: waiting.pop(rank).take() for rank in heard}

            yield hear


HERE: Places = _Here()
