"""What the user's own code raised: which part of a traceback is theirs, and one sentence that says where.

with calling("batches(15)"):      RecipeFailed: batches(15) raises OSError: disk gone (mine.py:12, in batches): ...
    batch = recipe.batches(15)
"""

from __future__ import annotations

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path
from traceback import FrameSummary

import torch

from pipeline.errors import PlanError, StageError
from pipeline.wording import said, shortened

__all__ = ["RecipeFailed", "calling", "place_of", "users_part"]

_HERE = Path(__file__).parents[1]
_NOT_THEIRS = (
    *(str(_HERE / package) + os.sep for package in ("pipeline", "workers", "launch")),
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")),
    str(Path(torch.__file__).parents[1]) + os.sep,
)
_EXCERPT = 8_000  # characters of a traceback


class RecipeFailed(PlanError):
    """A function of the user's recipe, ``what``, raised something. The original exception is its ``__cause__``."""

    def __init__(self, what: str, error: BaseException) -> None:
        super().__init__(f"{what} raises {said(error)}{place_of(error)}: mend it there.")
        self.excerpt = users_part(error) if len(_users_frames(error)) > 1 else ""  # one line is in the sentence

    def __reduce__(self) -> tuple[type[PlanError], tuple[str, ...]]:
        return PlanError, self.problems  # in another process the original exception may be none


@contextlib.contextmanager
def calling(what: str | None = None) -> Iterator[None]:
    """Around a call of the user's code: an exception but PlanError and StageError, or SystemExit, becomes RecipeFailed.

    ``what`` is called; None: what of the user's the traceback names first, and one without is left as it is.
    """
    try:
        yield
    except (PlanError, StageError):
        raise
    except (Exception, SystemExit) as error:
        if what is None and not (frames := _users_frames(error)):
            raise
        raise RecipeFailed(what or f"{frames[0].name}()", error) from error


def place_of(error: BaseException) -> str:
    """Where in the user's code an error began: `` (mine.py:12, in batches)``; empty where none of it was running."""
    if not (frames := _users_frames(error)):
        return ""
    last = frames[-1]
    file = os.path.relpath(last.filename)
    return f" ({last.filename if file.startswith('..') else file}:{last.lineno}, in {last.name})"


def users_part(error: BaseException) -> str:
    """The traceback of what began it, from the first line of the user's code on; empty where none of it was running."""
    begun = _first(error)
    frames = list(dropwhile(lambda frame: not _is_theirs(frame), traceback.extract_tb(begun.__traceback__)))
    text = "".join([*traceback.format_list(frames), *traceback.format_exception_only(begun)])
    return shortened(text, _EXCERPT) if frames else ""


def _users_frames(error: BaseException) -> list[FrameSummary]:
    return [frame for frame in traceback.extract_tb(_first(error).__traceback__) if _is_theirs(frame)]


def _first(error: BaseException) -> BaseException:
    """The exception that all the others were made of."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:  # a chain can be made to go in circles
        error = error.__cause__
        seen.add(id(error))
    return error


def _is_theirs(frame: FrameSummary) -> bool:
    generated = frame.filename.startswith("<")  # and frozen modules
    return not generated and not os.path.abspath(frame.filename).startswith(_NOT_THEIRS)
