"""The GPUs of this host, as the driver sees them: counted, never touched.

Workers come from a fork server, and a process that has initialised CUDA must not fork; besides, a driver that holds a
context takes memory from its workers. What is asked here goes to NVML, not to the CUDA runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline import Plan
from pipeline.plan.device_choice import CPU, DeviceChoice, choose_devices
from workers.channels.gpu.nccl import nccl_here

__all__ = ["chosen_here", "gpus_here"]


def gpus_here() -> int:
    """How many GPUs torch can use on this host; ``CUDA_VISIBLE_DEVICES`` counts."""
    return torch.cuda.device_count() if torch.backends.cuda.is_built() else 0


def chosen_here(plan: Plan, hosts: Sequence[str] | None = None, gpus: Sequence[int] | None = None) -> DeviceChoice:
    """Choose where the workers of a plan compute, or raise PlanError: there is no such device.

    ``hosts`` names the host of every worker (None: this one), ``gpus`` says how many each has (None: as many as here).
    """
    hosts = hosts or ["this host"] * plan.workers
    if plan.emulate is not None:
        return DeviceChoice((CPU,) * len(hosts), "stages sleep instead of computing")
    counts = dict(zip(hosts, gpus if gpus is not None else [gpus_here()] * len(hosts), strict=True))
    choice = choose_devices(plan.device, hosts, counts, torch.backends.cuda.is_built() or gpus is not None)
    return replace(choice, nccl=nccl_here())
