"""Where something was measured."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """What a measurement depends on."""
    cpus, gpus = Path("/proc/cpuinfo"), sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": next(_values(cpus, "model name"), "") if cpus.exists() else platform.processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "gpus": torch.cuda.device_count(),
        # As the driver's files name them: asking CUDA would initialise it in this process.
        "gpu_models": [model for path in gpus for model in _values(path, "Model:")],
    }


def _values(path: Path, key: str) -> Iterator[str]:
    """Of a file of lines ``key: value``."""
    return (line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith(key))
