"""The packages are layers: launch above workers above pipeline; imports point down, and pipeline touches no system.

The files are parsed, not imported, so this holds for branches that no run takes and packages that are not installed.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "pipeline": {"pipeline"},
    "workers": {"pipeline", "workers"},
    "launch": {"pipeline", "workers", "launch"},
}
NO_SYSTEM = {"multiprocessing", "socket", "subprocess", "time", "threading", "posix_ipc", "torch.multiprocessing"}
MAY_UNPICKLE = {
    "launch/setup/recipe_source.py": "the functions given to train(), which a child gets from its own parent"
}
"""Over the private pipe that a process starts its children with: never from a socket, nor from a file."""
POINT_TO_POINT = {"send", "recv", "isend", "irecv", "batch_isend_irecv", "P2POp"}
UNPICKLING = {
    f"{module}.{name}"
    for module in ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
    for name in ("load", "loads", "Unpickler", "open")
}

FILES = {path.relative_to(ROOT).as_posix(): path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), name) for name, path in FILES.items()}


def _imported(tree: ast.Module) -> set[str]:
    """Everything a file imports, at any depth, as dotted names: ``from a import b`` gives ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return names


def _aliases(tree: ast.Module) -> dict[str, str]:
    """What a local name stands for: ``import numpy as np`` gives np -> numpy."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom):
            names.update((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
    return names


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """``a.b.c`` as it is written, its first part looked up; empty for anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value, aliases)):
        return f"{owner}.{node.attr}"
    return ""


def _mentioned(tree: ast.Module) -> set[str]:
    """Every dotted name in use, plus everything imported."""
    aliases = _aliases(tree)
    used = {_dotted(node, aliases) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}
    return used | _imported(tree)


def _within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _upward(package: str, tree: ast.Module) -> set[str]:
    """Imports of a layer that this package may not know."""
    return {name for name in _imported(tree) if name.split(".")[0] in MAY_IMPORT.keys() - MAY_IMPORT[package]}


def _unpickles(tree: ast.Module) -> Iterator[str]:
    """Calls that would execute what a file or a peer contains."""
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func, aliases)
        flags = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in UNPICKLING:
            yield f"line {node.lineno}: {name}"
        if name == "torch.load" and not _is_true(flags.get("weights_only")):
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if name == "numpy.load" and _is_true(flags.get("allow_pickle")):
            yield f"line {node.lineno}: numpy.load with allow_pickle=True"


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _names_at_the_top(tree: ast.Module) -> set[str]:
    names = set(_aliases(tree))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def _all(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            value: list[str] = ast.literal_eval(node.value)
            return value
    return None


def test_there_is_something_to_look_at() -> None:
    assert {name.split("/")[0] for name in FILES} == MAY_IMPORT.keys()
    assert "launch/recipes/digits.py" in FILES, "packages inside packages count"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package: str) -> None:
    upward = {name: _upward(package, tree) for name, tree in TREES.items() if name.startswith(f"{package}/")}
    assert {name: found for name, found in upward.items() if found} == {}


def test_pipeline_starts_no_process_opens_no_socket_reads_no_clock() -> None:
    system = {
        name: {used for used in _mentioned(tree) if _within(used, NO_SYSTEM)}
        for name, tree in TREES.items()
        if name.startswith("pipeline/")
    }
    assert {name: found for name, found in system.items() if found} == {}


def test_whatever_is_imported_of_others_is_declared() -> None:
    """One package was there only because another one needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras.keys() - {"dev"} for line in extras[name])]
    declared = {_import_name(line) for line in lines}
    imported = {name: {one.split(".")[0] for one in _imported(tree)} for name, tree in TREES.items()}
    of_others = {name: found - sys.stdlib_module_names - {*MAY_IMPORT, "freewheel"} for name, found in imported.items()}
    assert {name: found - declared for name, found in of_others.items() if found - declared} == {}


def _import_name(requirement: str) -> str:
    """``scikit-learn>=1.4`` is imported as sklearn."""
    name = re.split(r"[^\w.-]", requirement)[0].lower()
    return {"scikit-learn": "sklearn"}.get(name, name.replace("-", "_"))


def test_ray_is_imported_in_one_file_at_most() -> None:
    files = [name for name, tree in TREES.items() if any(_within(used, {"ray"}) for used in _imported(tree))]
    assert len(files) <= 1, files


def test_point_to_point_messages_of_torch_distributed_are_sent_from_one_file_at_most() -> None:
    """Below launch (which compares with DDP) one file knows gloo and one NCCL; snapshots are another matter."""
    used = {name: _mentioned(tree) for name, tree in TREES.items()}
    sending = {f"torch.distributed.{name}" for name in POINT_TO_POINT}
    assert len([name for name in used if used[name] & sending]) <= 1
    knowing = [
        name
        for name in used
        if not name.startswith("launch/")
        and any(
            _within(one, {"torch.distributed"}) and not _within(one, {"torch.distributed.checkpoint"})
            for one in used[name]
        )
    ]
    assert set(knowing) <= {"workers/channels/net/gloo.py", "workers/channels/gpu/nccl.py"}, knowing


def test_nothing_is_unpickled_but_in_one_place() -> None:
    calls = {name: list(_unpickles(tree)) for name, tree in TREES.items()}
    assert {name: len(found) for name, found in calls.items() if found} == dict.fromkeys(MAY_UNPICKLE, 1)


@pytest.mark.parametrize("name", [name for name in FILES if not name.split("/")[-1].startswith("_")])
def test_every_public_module_says_what_it_is_for_and_what_is_public(name: str) -> None:
    tree = TREES[name]
    assert ast.get_docstring(tree), "a module begins with a docstring"
    public = _all(tree)
    assert public, "a module lists its public names in __all__"
    assert len(public) == len(set(public)), "every name stands there once"
    assert set(public) <= _names_at_the_top(tree)
    documented = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [node.name for node in documented if node.name in public and not ast.get_docstring(node)] == []


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("__init__.py")])
def test_a_package_says_what_it_is_for_and_offers_names_that_exist(name: str) -> None:
    tree = TREES[name]
    assert ast.get_docstring(tree)
    assert set(_all(tree) or ()) <= _names_at_the_top(tree)


def _private_imports(tree: ast.Module) -> set[str]:
    """What a file imports from another of ours that does not offer it in its ``__all__``."""
    hidden: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        path = node.module.replace(".", "/")
        source = TREES.get(f"{path}.py") or TREES.get(f"{path}/__init__.py")
        if source is None:
            continue
        names = {alias.name for alias in node.names if f"{path}/{alias.name}.py" not in TREES}
        hidden.update(f"{node.module}.{name}" for name in names - set(_all(source) or ()))
    return hidden


@pytest.mark.parametrize("name", FILES)
def test_files_take_from_each_other_what_is_public(name: str) -> None:
    assert _private_imports(TREES[name]) == set()


# ---------------------------------------------------------------- the checks see what they should


def test_an_import_of_something_private_is_seen() -> None:
    tree = ast.parse("from pipeline.plan.plan import Plan, _problems\nfrom launch import cli\nfrom os import path")
    assert _private_imports(tree) == {"pipeline.plan.plan._problems"}


def test_an_import_inside_a_function_counts() -> None:
    tree = ast.parse("def later() -> None:\n    from launch import cli\n")
    assert _upward("workers", tree) == {"launch", "launch.cli"}
    assert _upward("launch", tree) == set()
    assert _upward("pipeline", ast.parse("import workers.channels.shm.ring as shm")) == {"workers.channels.shm.ring"}
    assert _upward("pipeline", ast.parse("import pipelines, launcher")) == set()


def test_the_system_is_seen_through_an_alias() -> None:
    used = _mentioned(ast.parse("from torch import multiprocessing as mp\nmp.Queue()"))
    assert {name for name in used if _within(name, NO_SYSTEM)} == {
        "torch.multiprocessing",
        "torch.multiprocessing.Queue",
    }
    assert not any(_within(name, NO_SYSTEM) for name in _mentioned(ast.parse("time_ns = 3")))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "import pickle as p\np.load(file)",
        "from pickle import loads as read\nread(b'')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_unpickling_is_seen(source: str) -> None:
    assert list(_unpickles(ast.parse(source)))


def test_harmless_loading_passes() -> None:
    source = "import torch, json, pickle, numpy as np\ntorch.load('x', weights_only=True)\njson.loads('1')\n"
    assert not list(_unpickles(ast.parse(source + "pickle.dumps(3)\nnp.load('x', allow_pickle=False)")))
