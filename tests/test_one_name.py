"""``freewheel`` is the one name to import and run, whatever files of a user's are called pipeline, workers, launch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import freewheel
import launch
import pipeline

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[1]
NAMES = ("pipeline", "workers", "launch")
RECIPE = """
import torch, torch.nn.functional as F
from freewheel import Plan, Recipe
plan = Plan(mode="naive", stages=2, sizes=(1, 1), steps=4)
def model(): return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
def batches(i):
    x = torch.randn(8, 4)
    return x, x[:, :2].argmax(1)
loss = F.cross_entropy
"""
PROGRAM = """
from freewheel import train
from mine import *
print("steps", len(train(model=model, batches=batches, loss=loss, plan=plan, quiet=True).losses))
"""
TRAIN = ["train", "mine.py", "--name", "r", "--json", "r.json"]


def _run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=500)


def _with_names(folder: Path, packages: tuple[str, ...]) -> Path:
    """Files and packages of the user's that have our names and must not be run."""
    (folder / "mine.py").write_text(RECIPE)
    for name in NAMES:
        content = f"raise SystemExit('the {name} of the user was imported')\n"
        if name in packages:
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(content)
        else:
            (folder / f"{name}.py").write_text(content)
    return folder


def test_everything_that_users_need_has_this_name() -> None:
    assert set(freewheel.__all__) >= {"train", "Plan", "Recipe", "PlanError", "RunFailed"}
    assert set(launch.__all__) | set(pipeline.__all__) - {"nearest"} <= set(freewheel.__all__)
    assert all(getattr(freewheel, name) is not None for name in freewheel.__all__)
    assert freewheel.train is launch.train
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = freewheel.trian


def test_importing_it_imports_nothing_slow(tmp_path: Path) -> None:
    done = _run(
        "-c", "import freewheel, sys; print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))", folder=tmp_path
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.processes
@pytest.mark.parametrize("packages", [("workers",), ("pipeline", "launch")], ids=["files", "packages"])
@pytest.mark.parametrize("how", ["python -m", "script", "torchrun", "train()"])
def test_files_of_the_users_by_our_names_do_not_matter(how: str, packages: tuple[str, ...], tmp_path: Path) -> None:
    """A worker said "No module named 'pipeline.plan'; 'pipeline' is no package"; torchrun ran the user's launch.py."""
    folder = _with_names(tmp_path, packages)
    (folder / "bin").mkdir()
    (folder / "bin" / "freewheel").write_text("import sys\nfrom freewheel import main\nsys.exit(main())\n")
    (folder / "program.py").write_text(PROGRAM)
    command = {
        "python -m": ["-m", "freewheel", *TRAIN],
        "script": ["bin/freewheel", *TRAIN],
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "freewheel", *TRAIN],
        "train()": ["program.py"],
    }[how]
    done = _run(*command, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "steps 4\n" if how == "train()" else (folder / "r.json").is_file()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("line", ["import {}", "from {} import make_model", "import helper"])
def test_a_recipe_that_means_its_own_file_is_refused_by_name(name: str, line: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("def make_model(): ...\n")
    (tmp_path / "helper.py").write_text(f"import {name}\n")
    (tmp_path / "mine.py").write_text(f"{line.format(name)}\n{RECIPE}")
    why = freewheel.clash(tmp_path / "mine.py")
    assert why is not None
    assert f"imports {name}, which is the name of a package of Freewheel's, and there is {tmp_path}/{name}.py" in why
    (tmp_path / f"{name}.py").unlink()
    assert freewheel.clash(tmp_path / "mine.py") is None


def test_names_that_only_freewheel_has_are_freewheels(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").touch()
    (tmp_path / "mine.py").write_text("from pipeline import Plan, Recipe\nfrom pipeline.seeding import seeded\n")
    assert freewheel.clash(tmp_path / "mine.py") is None


def test_the_refusals_of_command_and_call(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("def make_model(): ...\n")
    (tmp_path / "mine.py").write_text(f"import pipeline\n{RECIPE}")
    sentence = f"mine.py imports pipeline, which is the name of a package of Freewheel's, and there is {tmp_path}/pipe"
    refused = _run("-m", "freewheel", *TRAIN, folder=tmp_path)
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert sentence in " ".join(refused.stderr.split())
    (tmp_path / "program.py").write_text("import pipeline\nfrom freewheel import train\n")
    refused = _run("program.py", folder=tmp_path)
    assert refused.returncode == 1
    assert f"ImportError: {tmp_path}/pipeline.py was imported as pipeline, which is the name of" in refused.stderr
    (tmp_path / "program.py").write_text("from freewheel import train\nimport pipeline\npipeline.make_model()\n")
    assert f"ImportError: {tmp_path}/program.py imports pipeline" in _run("program.py", folder=tmp_path).stderr
