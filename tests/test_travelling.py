"""``train`` called from programs of every kind: its workers get what the program has, and do not run it again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[1]

_FUNCTIONS = """
import functools, torch
from torch import nn
import torch.nn.functional as F
HIDDEN = 32

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return 2 * x
    @staticmethod
    def backward(ctx, g): return 2 * g

class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)
    def forward(self, x): return Twice.apply(F.relu(self.linear(x)))

@functools.cache
def data(): return torch.randn(64, 12, generator=torch.Generator().manual_seed(0))

def model(): return nn.Sequential(nn.Linear(12, HIDDEN), Block(HIDDEN), nn.Linear(HIDDEN, 5))
def batches(i):
    x = data()[i * 16 % 64:][:16]
    return x, x[:, :5].argmax(1)
loss = F.cross_entropy
"""
_TRAIN = """
from launch import train
from pipeline import Plan
plan = Plan(mode="unlocked", stages=2, sizes=(1, 2), steps=8)
result = train(model=model, batches=batches, loss=loss, plan=plan, quiet=True)
print("trained", [tuple(t.shape) for n, t in result.state_tensors().items() if n == "2.weight"], len(result.losses))
"""
_AS_ARGPARSE_DOES = """
if __name__ == "__main__":
    import sys
    HIDDEN = int(sys.argv[1])
"""


def _program(*arguments: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, input=stdin, env=environment, cwd=folder, capture_output=True, text=True, timeout=380
    )


@pytest.mark.parametrize("how", ["file", "-m", "-c", "stdin"])
def test_workers_get_what_the_program_has(how: str, tmp_path: Path) -> None:
    """With 24 set under the main guard, all workers trained 32 units; without a guard, without a file, with a lambda or
    a cached function of the program's own nothing was trained at all.
    """
    guarded = _TRAIN.replace("\n", "\n    ")
    program = f"print('runs')\n{_FUNCTIONS}loss = lambda o, l: F.cross_entropy(o, l)\n{_AS_ARGPARSE_DOES}"
    program += _TRAIN if how != "file" else guarded
    (tmp_path / "program.py").write_text(program)
    first = {"file": ["program.py"], "-m": ["-m", "program"], "-c": ["-c", program], "stdin": ["-"]}[how]
    done = _program(*first, "24", folder=tmp_path, stdin=program if how == "stdin" else "")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "runs\ntrained [(5, 24)] 8\n", "workers do not run the program"


def test_a_module_that_was_changed_since_its_import_is_refused(tmp_path: Path) -> None:
    """Workers import it anew, and trained what it says in its file."""
    (tmp_path / "net.py").write_text(_FUNCTIONS)
    change = "import net\nnet.HIDDEN = 64\nfrom net import *\n"
    refused = _program("-c", change + _TRAIN, folder=tmp_path)
    assert refused.returncode == 1
    assert "PlanError: what workers build is not what this process builds:\n  stage 0 (pid " in refused.stderr
    assert "0.weight is [64, 12] float32 here, [32, 12] float32 in the worker" in refused.stderr
    assert not list(tmp_path.rglob("metrics.jsonl")) or not any(
        path.read_text() for path in tmp_path.rglob("metrics.jsonl")
    )
    handed = "import net\nfrom net import *\ndef model():\n    net.HIDDEN = 64\n    return net.model()\n"
    done = _program("-c", handed + _TRAIN, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained [(5, 64)] 8\n", "")


def test_weights_that_do_not_follow_from_the_seed_are_refused(tmp_path: Path) -> None:
    """Every stage had weights of another model."""
    program = _FUNCTIONS + (
        "import os\n"
        "plain = model\n"
        "def model():\n"
        "    torch.manual_seed(int.from_bytes(os.urandom(4), 'little'))\n"
        "    return plain()\n"
    )
    refused = _program("-c", program + _TRAIN, folder=tmp_path)
    assert refused.returncode == 1
    assert "0.weight: other values in the worker" in refused.stderr
    assert "os.urandom" in refused.stderr


def test_a_module_that_trains_when_it_is_imported_is_told_so(tmp_path: Path) -> None:
    """Every worker would start workers of its own."""
    (tmp_path / "trains.py").write_text(_FUNCTIONS + _TRAIN)
    done = _program("-c", "import trains", folder=tmp_path)
    assert done.returncode == 1
    last = [line for line in done.stderr.splitlines() if "RunFailed" in line][-1]
    assert "train() is called whenever the module trains is imported, and every worker imports it" in last
