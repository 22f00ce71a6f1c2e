"""What a worker that cannot go on tells the driver: one sentence for the user, and the whole traceback for the file."""

from __future__ import annotations

import contextlib
import os

from pipeline.data.recipe import label_problem
from pipeline.errors import PlanError, StageError
from pipeline.plan.replica_layout import batch_of
from pipeline.user_code import RecipeFailed, place_of, users_part
from pipeline.wording import said, shortened, traceback_of
from workers.clock import now_ns
from workers.files import NotWritten
from workers.telemetry import records
from workers.worker.assignment import Assignment

__all__ = ["failure_of"]

_MOST_CHARACTERS = 3_000  # of the sentence; of an exception's text in it there are 2,000


def failure_of(assignment: Assignment, error: BaseException) -> records.Failure:
    """The report of what ended a worker."""
    layer, batch = (error.layer, error.batch) if isinstance(error, StageError) else (None, None)
    which = f"replica {assignment.replica}, " if assignment.plan.replicas > 1 else ""
    return records.Failure(
        stage=assignment.index,
        pid=os.getpid(),
        message=shortened(which + _sentence(assignment, error), _MOST_CHARACTERS),
        traceback=traceback_of(error),
        time_ns=now_ns(),
        layer=layer,
        batch=batch,
        replica=assignment.replica,
        shown=users_part(error),
    )


def _sentence(assignment: Assignment, error: BaseException) -> str:
    stage = f"stage {assignment.index}"
    if isinstance(error, StageError):
        problem = _label_problem(assignment, error)
        return str(error) if problem is None else f"{stage}, batch {error.batch}: {problem}"
    if isinstance(error, PlanError | NotWritten):  # they say what they are
        return f"{stage}: {error}{'' if isinstance(error, RecipeFailed) else place_of(error)}"
    return f"{stage}: {said(error)}{place_of(error)}"


def _label_problem(assignment: Assignment, error: StageError) -> str | None:
    """Whether it is a label that the loss or a DNI has no class for: neither says so. Looks once more at the batch."""
    plan = assignment.plan
    if error.batch is None or "out of bounds" not in str(error):
        return None
    with contextlib.suppress(Exception):  # whatever it is, the original error is the one to tell
        number = batch_of(plan, assignment.replica, error.batch)
        labels = assignment.source().seeded_batch(plan.seed, number).labels
        return label_problem(labels, assignment.resolved.output_shape)
    return None
