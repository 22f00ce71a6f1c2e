"""One rank's part in a run or a benchmark, whoever started its process: torchrun or Ray."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from launch.options.options import Parsed
from launch.ranks.agreement import PrepareTask
from pipeline import PlanError
from workers.supervision.control_records import Hello, WorkerStatus
from workers.supervision.control_socket import ControlSocket
from workers.supervision.rank_agent import serve

__all__ = ["RankPart", "TakesPart", "understood"]


@dataclass(frozen=True)
class RankPart:
    """What a rank needs to take part.

    Attributes:
        hello: who this is, for every connection anew.
        parsed: recipe and plan as this process understands them; None: it did not, and the driver ends it all.
        call: connects to the driver; in a benchmark once more for every training run.
        asked: whether somebody asked this process to end (SIGINT, SIGTERM).
        observe: see ``workers.supervision.rank_agent.serve``.
    """

    hello: Callable[[], Hello]
    parsed: Parsed | None
    prepare: PrepareTask
    call: Callable[[], ControlSocket]
    asked: Callable[[], bool]
    observe: Callable[[WorkerStatus], None] | None = None

    def train(self, wire: ControlSocket, last: bool = True) -> int:
        """Take part in one training run; see ``workers.supervision.rank_agent.serve``."""
        return serve(wire, self.hello(), partial(self.prepare, self.parsed), self.asked, self.observe, last)


TakesPart = Callable[[RankPart, ControlSocket], int]
"""`RankPart.train`, or ``launch.ranks.bench_rank.take_part``: (part, connection to the driver) -> exit status."""


def understood(parse: Callable[[], Parsed]) -> tuple[Parsed | None, list[str]]:
    """Recipe and plan, or why there are none here; prints nothing, as the driver prints the same. Exits where all that
    was asked for is help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parse(), []
    except PlanError as error:
        return None, list(error.problems)
    except SystemExit as ended:
        if not ended.code:
            raise
        return None, [f"it refuses the options: {' '.join(said.getvalue().split())}"]
