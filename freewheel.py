"""Freewheel under one name: ``from freewheel import Plan, train``, and ``python -m freewheel``, the command.

Its packages are called pipeline, workers and launch, as files of a user's may be. Once this is imported, these names
mean Freewheel's own, whatever lies in the working folder or beside a script; code that means a file of its own by one
of them is refused. Names are imported when they are asked for: torch takes seconds.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.results.result import Result
    from launch.training import train
    from pipeline import (
        ArrayBatches,
        Batch,
        ChannelPlan,
        DNIPlan,
        OptimizerPlan,
        Plan,
        PlanError,
        Recipe,
        StageError,
        check_plan,
        correct_predictions,
        run_reference,
    )
    from workers.errors import RunFailed
    from workers.files import NotWritten

__all__ = [
    "ArrayBatches",
    "Batch",
    "ChannelPlan",
    "DNIPlan",
    "NotWritten",
    "OptimizerPlan",
    "Plan",
    "PlanError",
    "Recipe",
    "Result",
    "RunFailed",
    "StageError",
    "check_plan",
    "clash",
    "correct_predictions",
    "main",
    "run_reference",
    "train",
]

_HERE = Path(__file__).resolve().parent
_PACKAGES = ("pipeline", "workers", "launch")
_WHERE = {
    "NotWritten": "workers.files",
    "Result": "launch.results.result",
    "RunFailed": "workers.errors",
    "train": "launch.training",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE.get(name, "pipeline")), name)


def main() -> None:
    """Run the command line and exit; status as in ``launch.cli``, 2 where a name is taken."""
    from launch.__main__ import main as command

    command()


def clash(path: Path) -> str | None:
    """Why a Python file cannot run with Freewheel: it, or what it imports from beside it, means a file of its own by
    the name of one of Freewheel's packages. None: it does not.
    """
    return next(_clashes(path, set()), None)


def _clashes(path: Path, seen: set[Path]) -> Iterator[str]:
    seen.add(path)
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for module, names in _imports(tree):
        top = module.partition(".")[0]
        folder = path.parent / top
        beside = next((at for at in (folder / "__init__.py", path.parent / f"{top}.py") if at.is_file()), None)
        beside = beside or (folder if folder.is_dir() and top in _PACKAGES else None)
        if beside is None or _HERE in (beside.parent, beside.parent.parent):
            continue
        if top in _PACKAGES and not _is_ours(module, names):
            yield (
                f"{path} imports {module}, which is the name of a package of Freewheel's, and there is {beside}: give "
                "that another name, and import Freewheel's own from freewheel."
            )
        elif top not in _PACKAGES and beside not in seen:
            yield from _clashes(beside, seen)


def _imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, [alias.name for alias in node.names]


def _is_ours(module: str, names: Sequence[str]) -> bool:
    """Whether an import can only mean Freewheel: a module of its packages', or names that such a package offers."""
    if "." in module:
        at = _HERE / module.replace(".", "/")
        return at.with_suffix(".py").is_file() or at.is_dir()
    tree = ast.parse((_HERE / module / "__init__.py").read_bytes())
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    lists = (node.value for node in assigned if "__all__" in ast.dump(node.targets[0]))
    return bool(names) and set(names) <= {name for found in lists for name in ast.literal_eval(found)}


class _Finder:
    """Finds the three packages here, before anybody looks on ``sys.path``."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is not None or name not in _PACKAGES:
            return None
        at = _HERE / name
        return importlib.util.spec_from_file_location(name, at / "__init__.py", submodule_search_locations=[str(at)])


def _taken() -> str | None:
    """Why Freewheel cannot be imported into this program, if so."""
    for name in _PACKAGES:
        module = sys.modules.get(name)
        places = list(filter(None, [getattr(module, "__file__", None), *getattr(module, "__path__", [])]))
        if module is not None and not any(Path(place).resolve().is_relative_to(_HERE / name) for place in places):
            what = places[0] if places else "a module"
            return (
                f"{what} was imported as {name}, which is the name of a package of Freewheel's: give it another name."
            )
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return clash(Path(script).resolve()) if script and Path(script).resolve().parent != _HERE else None


if (_why := _taken()) is not None:
    if __name__ == "__main__":
        print(f"freewheel: {_why}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(_why)
if not any(getattr(finder, "__qualname__", "") == _Finder.__qualname__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder)

if __name__ == "__main__":
    main()
