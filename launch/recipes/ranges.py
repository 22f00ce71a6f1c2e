"""The checks of the built-in recipes' options."""

from __future__ import annotations

from numbers import Integral

from pipeline import PlanError

__all__ = ["check_counts"]

_MOST = 1_000_000


def check_counts(**options: int) -> None:
    """Refuse options that are not whole numbers, at least 1 and at most 1,000,000, with a sentence for each."""
    problems = []
    for name, value in options.items():
        if not (isinstance(value, Integral) and value >= 1):
            problems.append(f"{name} is {value}: it must be a whole number, at least 1.")
        elif value > _MOST:
            problems.append(f"{name} is {str(value)[:40]}: it must be at most {_MOST:,}.")
    if problems:
        raise PlanError(*problems)
