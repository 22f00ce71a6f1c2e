"""Who starts the workers, and what the user types and sees.

The names are imported when they are asked for: ``python -m launch`` imports this package first, and what it needs takes
seconds to import, in which Ctrl-C may come (``launch.__main__``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freewheel import Result, RunFailed, train

__all__ = ["Result", "RunFailed", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import freewheel  # knows where each of its names is

    return getattr(freewheel, name)
