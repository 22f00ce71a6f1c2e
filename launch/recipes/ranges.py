"""The checks of the built-in recipes' options."""

from __future__ import annotations

from numbers import Integral

from pipeline import PlanError

__all__ = ["check_counts"]


def check_counts(**options: int) -> None:
    """Refuse options that are not whole numbers, at least 1.

    Raises:
        PlanError: with one sentence per mistake.
    """
    problems = [
        f"{name} is {value}: it must be a whole number, at least 1."
        for name, value in options.items()
        if not (isinstance(value, Integral) and value >= 1)
    ]
    if problems:
        raise PlanError(*problems)
