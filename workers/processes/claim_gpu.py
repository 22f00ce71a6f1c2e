"""What a process does before it computes as its plan says: claim its GPU; and how much memory it used."""

from __future__ import annotations

import os
import resource

import torch

from pipeline.plan.device_choice import on_gpu
from pipeline.plan.plan import Plan

__all__ = ["claim", "finish", "peak_memory_bytes", "prepare_device"]


def claim(device: str, *, deterministic: bool = False) -> None:
    """Make ``device`` this process's current one; initialises CUDA if it is a GPU.

    ``deterministic``: with algorithms that give the same bits every time; torch warns where there are none.

    Raises RuntimeError where the GPU cannot be had: what CUDA said, and what to do.
    """
    if not on_gpu(device):
        return
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.cuda.set_device(device)
        torch.cuda.init()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(
            f"process {os.getpid()} cannot use {device}: {error}. Look at nvidia-smi for who else uses it (compute "
            "mode, free memory), or choose device cpu."
        ) from error


def prepare_device(device: str, plan: Plan) -> None:
    """``claim`` for a process that computes as the plan says; one that compiles does so without helpers of its own."""
    claim(device, deterministic=plan.deterministic)
    if plan.compile:
        import torch._inductor.config as inductor  # slow, and nobody else needs it

        inductor.compile_threads = 1  # else torch starts a pool of processes, in every worker


def finish(device: str) -> None:
    """Wait until the device has done all that this process gave it; nothing on the CPU."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: str) -> int:
    """Most memory that this process had in use at any time: of the GPU, by tensors; else resident memory."""
    if on_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
