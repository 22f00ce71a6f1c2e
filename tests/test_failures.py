"""When things go wrong: the run ends soon, names the stage, and leaves nothing behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import problems
import psutil
import pytest
import torch.nn.functional as F
from conftest import left_in_shared_memory
from torch import Tensor, nn
from torchrun_program import left_in

from launch import RunFailed, train
from pipeline import DNIPlan, Plan, PlanError
from pipeline.metrics.spans import Span
from workers import errors
from workers.processes import context
from workers.telemetry.status_table import Status
from workers.worker import orphan
from workers.worker.unnamed_file import UnnamedFile

pytestmark = pytest.mark.processes
HERE = Path(__file__).parent
UNSEEN_S = 50.0
"""Before a failure that nobody saw would end as a stall, after 60 s."""


def _seconds(call: Callable[[], object]) -> tuple[RunFailed, float]:
    begin = time.monotonic()
    with pytest.raises(RunFailed) as caught:
        call()
    return caught.value, time.monotonic() - begin


def test_an_exception_in_layer_3_of_stage_1_travels_whole(tmp_path: Path) -> None:
    """Batch 5, the fourth layer of stage 1: stage, layer, batch, pid and traceback arrive; the other stage stops."""
    plan = Plan(mode="naive", stages=2, sizes=(2, 4), steps=1000)
    run = partial(train, model=problems.failing, batches=problems.batch, loss=F.cross_entropy, plan=plan, quiet=True)
    failure, seconds = _seconds(lambda: run(runs=tmp_path))
    assert (failure.stage, failure.layer, failure.batch) == (1, "5", 5)
    assert "stage 1, layer 5, batch 5: ZeroDivisionError: as planned (pid" in str(failure)
    assert "raise ZeroDivisionError" in failure.details
    first, *_, last = failure.shown.splitlines()
    assert (first.split(", ")[0], last) == (f'  File "{problems.__file__}"', "ZeroDivisionError: as planned")
    assert "worker_main" in failure.details
    assert "worker_main" not in failure.shown
    assert seconds < UNSEEN_S
    assert "as planned" in next(tmp_path.glob("*/failure.txt")).read_text()


@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_a_killed_worker_ends_the_run(mode: str, tmp_path: Path) -> None:
    plan = Plan(mode=mode, stages=2, sizes=(2, 2), steps=100_000)
    failure, seconds = _seconds(
        lambda: train(
            model=partial(problems.suicidal, int(signal.SIGKILL)),
            batches=problems.batch,
            loss=F.cross_entropy,
            plan=plan,
            runs=tmp_path,
            quiet=True,
        )
    )
    assert (failure.stage, failure.batch) == (1, 5)
    assert "was killed by SIGKILL, forward of batch 5" in str(failure)
    assert seconds < UNSEEN_S


@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_a_stopped_worker_is_reported_after_the_stall_limit(mode: str, tmp_path: Path) -> None:
    plan = Plan(mode=mode, stages=2, sizes=(2, 2), steps=100_000, stall_after_s=1.5)
    failure, seconds = _seconds(
        lambda: train(
            model=partial(problems.suicidal, int(signal.SIGSTOP)),
            batches=problems.batch,
            loss=F.cross_entropy,
            plan=plan,
            runs=tmp_path,
            quiet=True,
        )
    )
    assert (failure.stage, failure.batch) == (1, 5)
    assert "no progress for 1.5 s: stage 1" in str(failure)
    assert "the process is stopped" in str(failure)
    assert "stage 0  waits" in failure.details
    assert seconds < UNSEEN_S


def test_a_loss_that_is_not_finite_is_reported_where_it_appears(tmp_path: Path) -> None:
    """With a DNI that does not compute it as well: a loss model may find it first."""
    failure, _ = _seconds(
        lambda: train(
            model=problems.dropout_and_batch_norm,
            batches=problems.batches_of_one_class_at_7,
            loss=problems.loss_that_explodes,
            plan=Plan(stages=2, sizes=(4, 4), steps=50, dni=DNIPlan(form="label_residual")),
            runs=tmp_path,
            quiet=True,
        )
    )
    assert failure.stage == 1
    assert "the loss is inf" in str(failure)


class KillsTheForkServer(nn.Module):
    """An identity that kills, in the 5th training batch, the process that all workers come from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        """As it is."""
        self.seen += self.training
        if self.seen == 5:
            os.kill(os.getppid(), signal.SIGKILL)
        return x


def _kills_the_fork_server() -> list[nn.Module]:
    width, classes = problems.WIDTH, problems.CLASSES
    return [nn.Linear(width, width), nn.Linear(width, width), KillsTheForkServer(), nn.Linear(width, classes)]


@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_a_killed_fork_server_is_named_and_nobody_else(mode: str, tmp_path: Path) -> None:
    """Any stage was said to have exited with 255, and to have printed what nobody had printed."""
    plan = Plan(mode=mode, stages=2, sizes=(2, 2), steps=100_000)
    batches = problems.batch
    run = partial(train, model=_kills_the_fork_server, batches=batches, loss=F.cross_entropy, plan=plan, quiet=True)
    failure, seconds = _seconds(lambda: run(runs=tmp_path))
    assert re.fullmatch(
        r"the process that all workers come from \(pid \d+\) was ended by signal 9 \(SIGKILL\); look at the system's "
        "log for who did that",
        str(failure),
    )
    assert (failure.stage, failure.batch, failure.details) == (None, None, "")
    assert seconds < UNSEEN_S
    plan = Plan(mode="naive", stages=2, sizes=(1, 1), steps=4)
    run = partial(train, model=problems.two_linear, batches=batches, loss=F.cross_entropy, plan=plan, quiet=True)
    assert len(run(runs=tmp_path).losses) == 4, "the next run gets a fork server of its own"


def test_a_worker_that_exits_with_the_number_of_a_lost_fork_server_is_named(tmp_path: Path) -> None:
    def run() -> None:
        train(
            model=_leaves_with_255,
            batches=problems.batch,
            loss=F.cross_entropy,
            plan=Plan(mode="naive", stages=2, sizes=(1, 1), steps=50),
            runs=tmp_path,
            quiet=True,
        )

    failure, _ = _seconds(run)
    assert re.match(r"stage 1 \(pid \d+\) exited with 255", str(failure))


class _Leaves(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and multiprocessing.parent_process() is not None:  # not where the driver tries the model
            os._exit(255)
        return super().forward(x)


def _leaves_with_255() -> list[nn.Module]:
    return [nn.Linear(problems.WIDTH, problems.WIDTH), _Leaves(problems.WIDTH, problems.CLASSES)]


# ---------------------------------------------------------------- where temporary files go

_SHORT_RUN = """
import sys, torch
from launch import train
from pipeline import Plan
def model(): return [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
def batches(i): return torch.ones(4, 2), torch.ones(4, 2)
if __name__ == "__main__":
    plan = Plan(steps=2, stages=2, mode="naive", balance="layers")
    train(model=model, batches=batches, loss=torch.nn.functional.mse_loss, plan=plan, quiet=True, runs=sys.argv[1])
"""


def _run_with(folder: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(_SHORT_RUN)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "TMPDIR": folder}
    command = [sys.executable, str(program), str(tmp_path / "runs")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


def test_a_long_tmpdir_is_no_hindrance(tmp_path: Path) -> None:
    """The path of a socket has 107 bytes at most: it was "AF_UNIX path too long"."""
    long = Path(os.path.realpath(tmp_path), "x" * (105 - len(os.path.realpath(tmp_path)) - 1))
    long.mkdir()
    assert len(str(long)) == 105
    done = _run_with(str(long), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not left_in(long)


def test_a_tmpdir_that_is_not_there_is_no_hindrance(tmp_path: Path) -> None:
    done = _run_with(str(tmp_path / "nowhere"), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("call", [context.listener, UnnamedFile], ids=["socket", "file"])
def test_where_no_temporary_file_can_be_made_one_sentence_says_so(
    call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/nowhere', '/tmp']")

    for name in ("gettempdir", "TemporaryFile"):
        monkeypatch.setattr(tempfile, name, full)
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    with pytest.raises(PlanError) as refused:
        call()
    assert refused.value.problems == (
        "no temporary file can be made: No usable temporary directory found in ['/nowhere', '/tmp']; set TMPDIR to a "
        "folder that is there, has room, and can be written.",
    )


def test_where_there_is_no_short_folder_tmpdir_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    long, access = "/" + "x" * 104, os.access
    assert len(context.folder_for_sockets(60)) <= 47
    monkeypatch.setattr(tempfile, "gettempdir", lambda: long)
    with monkeypatch.context() as before:
        before.setenv("XDG_RUNTIME_DIR", str(HERE))
        assert context.folder_for_sockets(32) == (
            str(HERE) if len(str(HERE)) <= 75 and access(HERE, os.W_OK) else "/tmp"
        )
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match=f"^TMPDIR is {long}: too long for .+ of at most 75 bytes"):
        context.listener()


# ---------------------------------------------------------------- the driver itself, as a program


@pytest.fixture
def temp() -> Iterator[Path]:
    """A $TMPDIR for one program: a short name, as there will be a socket in it."""
    with tempfile.TemporaryDirectory(prefix="fw", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def driver(tmp_path: Path, temp: Path) -> Iterator[subprocess.Popen[str]]:
    """An endless run from the command line, ended whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "train", str(HERE / "endless.py"), "--runs", str(tmp_path), "--name", "r"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "TMPDIR": str(temp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for child in _family(process.pid):
            child.kill()
        process.communicate(timeout=10)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _wait_for_training(driver: subprocess.Popen[str], within_s: float = 150.0) -> None:
    """Block until the driver tells of its first pass over the held-out batches; a driver that is late is killed."""
    assert driver.stdout is not None
    late = threading.Timer(within_s, driver.kill)
    late.start()
    try:
        said = list(itertools.takewhile(lambda line: "held-out loss" not in line, driver.stdout))
        assert driver.poll() is None, f"no training within {within_s} s: {''.join(said)}"
    finally:
        late.cancel()
        late.join()


def _still_running(family: list[psutil.Process], within_s: float = 60.0) -> list[psutil.Process]:
    """Who has not ended in time. A zombie has: whoever adopts it, in a container nobody, only has not looked yet."""
    deadline = time.monotonic() + within_s
    left = [process for process in family if not _ended(process)]
    while left and (left_s := deadline - time.monotonic()) > 0:
        _, left = psutil.wait_procs(left, timeout=min(0.2, left_s))
        left = [process for process in left if not _ended(process)]
    return left


def _ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupted_driver_stops_its_workers(
    number: signal.Signals, status: int, driver: subprocess.Popen[str]
) -> None:
    _wait_for_training(driver)
    family = _family(driver.pid)
    os.killpg(driver.pid, number)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == status
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert not _still_running(family)
    assert not left_in_shared_memory(driver.pid)


def test_workers_of_a_killed_driver_end_by_themselves(driver: subprocess.Popen[str], temp: Path) -> None:
    _wait_for_training(driver)
    family = _family(driver.pid)
    assert len(family) >= 3, "driver and two workers"
    driver.kill()
    assert not _still_running(family)
    assert not left_in_shared_memory(driver.pid)
    assert not left_in(temp), "the fork server's socket was the driver's to remove"


def test_a_worker_that_is_told_to_end_tidies_up_after_its_dead_driver_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a neighbour's agent, which saw the driver die as well, could end the worker before it had tidied up."""
    driver, its_end = os.pipe()
    leaving, done = threading.Event(), list[str]()

    def tidy(*_: object) -> None:
        assert leaving.wait(10.0)
        done.append("tidied up")

    monkeypatch.setattr(orphan, "parent_process", lambda: SimpleNamespace(sentinel=driver))
    monkeypatch.setattr(orphan, "unlink_all", tidy)
    monkeypatch.setattr(os, "killpg", lambda *_: done.append("killed"))
    with orphan.ends_with_the_driver(SimpleNamespace(resolved=None, names=None), None):  # type: ignore[arg-type]
        os.close(its_end)
        leaving.set()
    os.close(driver)
    assert done == ["tidied up", "killed"]


def test_batches_that_raise_are_named_with_the_number_and_the_place(tmp_path: Path) -> None:
    """It was "stage 0: OSError: disk gone"."""
    batches, plan = problems.batches_that_end, Plan(mode="naive", stages=1, steps=20)
    run = partial(train, model=problems.two_linear, batches=batches, loss=F.cross_entropy, plan=plan, quiet=True)
    failure, _ = _seconds(lambda: run(runs=tmp_path))
    place = r"\(.*problems.py:\d+, in batches_that_end\)"
    assert re.match(rf"stage 0: batches\(15\) raises OSError: disk gone {place}: mend it there. \(pid", str(failure))
    assert failure.report == next(tmp_path.glob("*/failure.txt"))


@pytest.mark.parametrize("mode", ["naive", "unlocked"])
def test_a_label_out_of_range_is_told_as_that(mode: str, tmp_path: Path) -> None:
    """It was an index out of bounds, in the loss or in a DNI, whoever met it first."""
    batches, plan = problems.batches_with_a_wrong_label, Plan(mode=mode, stages=2, sizes=(1, 1), steps=20)
    run = partial(train, model=problems.two_linear, batches=batches, loss=F.cross_entropy, plan=plan, quiet=True)
    failure, _ = _seconds(lambda: run(runs=tmp_path))
    sentence = r"stage [01], batch 7: label 9 is out of range, as the network's output has 5 classes, 0 to 4: mend the "
    assert re.match(sentence, str(failure)), str(failure)
    assert failure.shown == ""


@pytest.mark.parametrize(
    ("exit_code", "told"),
    [
        (-signal.SIGKILL, "was killed by SIGKILL; look at the system's log for an out-of-memory kill"),
        (-signal.SIGSEGV, "was killed by SIGSEGV; what it printed stands above, if it said anything"),
        (1, "exited with 1; what it printed stands above, if it said anything"),
    ],
)
def test_only_a_kill_is_said_to_be_one(exit_code: int, told: str) -> None:
    failure = errors.killed(1, 7, exit_code, Status(Span.OTHER, -1, 0, 0))
    assert str(failure) == f"stage 1 (pid 7) {told}"
