"""Which channel a cut gets, and what travels on it: choices that need no process to be made.

    workers of one host             shared memory, the cheapest way there is
    workers on GPUs of one host     CUDA peer memory: from GPU memory to GPU memory
    workers of two hosts            gloo: TCP, by torch.distributed
    workers on GPUs of two hosts    NCCL, where torch has it: from GPU memory to GPU memory; headers over gloo

A wire dtype narrows the first tensor of a message, the activation or the gradient, and only if it is float32. Labels
travel as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.errors import PlanError
from pipeline.messages.bundle import Bundle
from pipeline.messages.message import Message
from pipeline.plan.device_choice import CPU, on_gpu

__all__ = ["CHANNELS", "WIRE_DTYPES", "ChannelChoice", "choose_channels", "kind_between", "narrowed", "widened"]

CHANNELS = {"shm": "shared memory", "gloo": "gloo", "cuda": "CUDA peer memory", "nccl": "NCCL"}
"""What can carry messages, and how users see it called."""
WIRE_DTYPES = {"bf16": torch.bfloat16}
"""What float32 may be narrowed to on its way."""


@dataclass(frozen=True)
class ChannelChoice:
    """What carries the messages of one cut, a key of ``CHANNELS``; and why, for the first screen."""

    kind: str
    why: str


def choose_channels(
    wanted: str, hosts: Sequence[str], replicas: int = 1, devices: Sequence[str] | None = None, nccl: bool = False
) -> tuple[ChannelChoice, ...]:
    """Choose what carries each cut, those of replica 0 first.

    Args:
        wanted: a key of ``CHANNELS`` for all cuts, or ``auto``: for each the fastest that both workers can reach.
        hosts: of every worker, those of replica 0 first.
        replicas: of the pipeline.
        devices: of every worker; None: the CPU.
        nccl: whether torch has NCCL.

    Raises:
        PlanError: shared memory between two hosts; CUDA peer memory between two hosts, or with a worker on the CPU;
            NCCL where torch has none, with a worker on the CPU, or between two workers on one GPU.
    """
    stages = len(hosts) // replicas
    workers = list(zip(hosts, devices or [CPU] * len(hosts), strict=True))
    pipelines = [workers[start : start + stages] for start in range(0, len(workers), stages)]
    pairs = [pair for pipeline in pipelines for pair in itertools.pairwise(pipeline)]
    if wanted == "nccl" and not nccl:
        raise PlanError(
            "channels nccl: this torch is built without NCCL: install a build of torch with CUDA, or choose channels "
            "auto."
        )
    for index, (one, other) in enumerate(pairs):
        _check_reach(wanted, one, other, f"the workers on both sides of cut {index % (stages - 1)}")
    for pipeline in pipelines[1:]:
        for one, other in zip(pipelines[0], pipeline, strict=True):
            _check_reach(wanted, one, other, "replicas of a stage")
    if wanted != "auto":
        return tuple(ChannelChoice(wanted, "as asked for") for _ in pairs)
    together = "all workers on this host" if len(set(hosts)) == 1 else "both workers on one host"
    return tuple(_chosen(one, other, together, nccl) for one, other in pairs)


def kind_between(wanted: str, one: tuple[str, str], other: tuple[str, str], nccl: bool = False) -> str:
    """What carries messages between two workers, each (host, device), if ``wanted`` is: a key of ``CHANNELS``."""
    return wanted if wanted != "auto" else _chosen(one, other, "", nccl).kind


def _chosen(one: tuple[str, str], other: tuple[str, str], together: str, nccl: bool) -> ChannelChoice:
    """What ``auto`` chooses between two workers, each (host, device)."""
    gpus = on_gpu(one[1]) and on_gpu(other[1])
    if one[0] != other[0]:
        why = f"{one[0]} and {other[0]} are two hosts"
        if gpus and nccl:
            return ChannelChoice("nccl", f"{why}, both workers on GPUs")
        return ChannelChoice("gloo", f"{why}, and this torch is built without NCCL" if gpus else why)
    if gpus:
        where = f"both workers on {one[1]}" if one[1] == other[1] else f"{one[1]} and {other[1]} are on one host"
        return ChannelChoice("cuda", where)
    return ChannelChoice("shm", together)


def _check_reach(wanted: str, one: tuple[str, str], other: tuple[str, str], who: str) -> None:
    if wanted in ("shm", "cuda") and one[0] != other[0]:
        raise PlanError(
            f"channels {wanted}: {who} are on different hosts, {one[0]} and {other[0]}, which share no memory: choose "
            "channels auto or gloo."
        )
    if wanted in ("cuda", "nccl") and not (on_gpu(one[1]) and on_gpu(other[1])):
        raise PlanError(
            f"channels {wanted}: {who} compute on {one[1]} and {other[1]}, and {CHANNELS[wanted]} lies between "
            "GPUs: choose channels auto, or device cuda."
        )
    if wanted == "nccl" and one == other:
        raise PlanError(
            f"channels nccl: {who} are both on {one[1]} of {one[0]}, and NCCL refuses two on one GPU: choose channels "
            "auto, or a device for each."
        )


def narrowed(message: Message, wire_dtype: torch.dtype | None) -> Message:
    """The message as it travels: float32 in its payload in ``wire_dtype``; the very message where there is none.

    A payload that has tensors of that dtype already travels as it is: on arrival nobody could tell them apart.
    """
    dtypes = {tensor.dtype for tensor in message.payload if tensor is not None}
    if wire_dtype is None or torch.float32 not in dtypes or wire_dtype in dtypes:
        return message
    return replace(message, payload=_in_place_of(torch.float32, wire_dtype, message.payload))


def widened(message: Message) -> Message:
    """A narrowed message as it is received: its payload in float32 again, rounded to what travelled."""
    payload = message.payload
    for dtype in WIRE_DTYPES.values():
        payload = _in_place_of(dtype, torch.float32, payload)
    return replace(message, payload=payload)


def _in_place_of(one: torch.dtype, other: torch.dtype, payload: Bundle) -> Bundle:
    return tuple([t.detach().to(other) if t is not None and t.dtype == one else t for t in payload])
