"""The rooms are floors: each imports itself and those below it, so the structure is read from the list, bottom first.

A room is a package (``pipeline.stage``) or a module that lies directly in a layer (``pipeline.errors``).
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ("pipeline", "workers", "launch")
ROOMS = (
    "pipeline.errors",
    "pipeline.wording",
    "pipeline.user_code",
    "pipeline.seeding",
    "pipeline.state",
    "pipeline.messages",
    "pipeline.schedule",
    "pipeline.plan",
    "pipeline.model",
    "pipeline.dni",
    "pipeline.data",
    "pipeline.metrics",
    "pipeline.replicas",
    "pipeline.stage",
    "pipeline.run",
    "pipeline",
    "workers.clock",
    "workers.files",
    "workers.telemetry",
    "workers.errors",
    "workers.processes",
    "workers.channels",
    "workers.channels.shm",
    "workers.channels.net",
    "workers.channels.gpu",
    "workers.wiring",
    "workers.worker",
    "workers.supervision",
    "workers",
    "launch.recipes",
    "launch.setup",
    "launch.results",
    "launch.options",
    "launch.show",
    "launch.training",
    "launch.bench.rivals",
    "launch.bench",
    "launch.ranks",
    "launch.on_ray",
    "launch.plots",
    "launch.sweep",
    "launch.cli",
    "launch",
    "launch.__main__",
)
MOST_MODULES, MOST_LINES, MEDIAN_LINES = 15, 350, 130

FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def _room(module: str) -> str:
    """The package a module lies in; the module itself where it lies directly in a layer, or is a package."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    return module if package in LAYERS else package


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """Our modules that a module imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(_tree(module)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            found |= {name} if name else set()
    return frozenset(found)


def test_every_room_stands_in_the_list() -> None:
    assert {_room(module) for module in MODULES} == set(ROOMS)


def test_a_room_imports_itself_and_those_below_it() -> None:
    place = {room: index for index, room in enumerate(ROOMS)}
    upward = {
        f"{module} imports {imported}"
        for module in MODULES
        for imported in _imports(module)
        if place[_room(imported)] > place[_room(module)] and module not in LAYERS
    }
    assert upward == set()


def test_modules_of_a_room_do_not_import_each_other_in_circles() -> None:
    plain = {module for module, path in MODULES.items() if path.name != "__init__.py"}
    below = {module: (_imports(module) & plain) - {module} for module in plain}
    while free := {module for module, imported in below.items() if not imported}:
        below = {module: imported - free for module, imported in below.items() if module not in free}
    assert not below, f"these stand in a circle or on one: {sorted(below)}"


def test_no_public_class_or_function_has_the_name_of_another() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        for node in _tree(module).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places[node.name].add(module)
    assert {name: where for name, where in places.items() if len(where) > 1 and name != "main"} == {}


def test_a_room_can_be_taken_in_at_a_glance() -> None:
    folders = {path.parent for path in FILES}
    crowded = {str(folder): count for folder in folders if (count := len(list(folder.glob("*.py"))) - 1) > MOST_MODULES}
    assert crowded == {}


def test_a_file_is_one_concept() -> None:
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert sorted(lines.values())[len(lines) // 2] <= MEDIAN_LINES
