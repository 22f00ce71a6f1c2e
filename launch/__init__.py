"""Who starts the workers, and what the user types and sees.

The names are imported when they are asked for: ``python -m launch`` imports this package first, and what it needs takes
seconds to import, in which Ctrl-C may come (``launch.__main__``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.results.result import Result
    from launch.training import train
    from workers.errors import RunFailed

__all__ = ["Result", "RunFailed", "train"]

_WHERE = {"Result": "launch.results.result", "RunFailed": "workers.errors", "train": "launch.training"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
