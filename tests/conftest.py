"""What every test may rely on: one thread, data when it is there, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

_SLOW = ("two_hosts", "ray", "torchrun", "convergence", "bench_torchrun", "until", "peers", "replicas", "over", "cli")


def pytest_configure() -> None:
    """One thread for fixtures of a whole module too, which are made before ``one_thread`` is.

    A shell's background job ignores SIGINT, and so would every program that a test starts and interrupts.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: whoever runs two at a time then ends with short ones.

    Tests marked ``gpu`` need one, or as many as the mark says: gpu(2).
    """
    places = {f"test_{name}": place for place, name in enumerate(_SLOW)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    there = torch.cuda.device_count()
    for item in items:
        needed = max((mark.args[0] if mark.args else 1 for mark in item.iter_markers("gpu")), default=0)
        if needed > there:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, torch {torch.__version__} finds {there}"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Workers compute with one thread; so does what they are compared with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No child process and no shared memory of ours outlives a test."""
    yield
    children = [child for child in psutil.Process().children(recursive=True) if not _is_server(child)]
    assert not children, f"processes left behind: {children}"
    assert not left_in_shared_memory(), f"shared memory left behind: {left_in_shared_memory()}"


def left_in_shared_memory(pid: int | None = None) -> list[str]:
    """Names in shared memory that belong to runs of this process, or of process ``pid``."""
    folder = Path("/dev/shm")
    return sorted(e.name for e in folder.iterdir() if f"fw-{pid or os.getpid()}-" in e.name) if folder.is_dir() else []


def _is_server(process: psutil.Process) -> bool:
    """multiprocessing keeps one fork server and one resource tracker per program; they end with it."""
    try:
        command = " ".join(process.cmdline())
        is_child_of_server = process.parent() is not None and process.ppid() != os.getpid()
        return not is_child_of_server and ("forkserver" in command or "resource_tracker" in command)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with mnist/ and tinyshakespeare.txt: $FREEWHEEL_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("FREEWHEEL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set FREEWHEEL_DATA to a folder with mnist/ and tinyshakespeare.txt")
    return folder
