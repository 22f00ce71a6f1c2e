"""Which channel a cut gets, and what travels on it: choices that need no process to be made.

    workers of one host             shared memory, the cheapest way there is
    workers on GPUs of one host     CUDA peer memory: from GPU memory to GPU memory
    workers of two hosts            gloo: TCP, by torch.distributed
    workers on GPUs of two hosts    NCCL, where torch has it: from GPU memory to GPU memory; headers over gloo

A wire dtype narrows the float32 tensors of activations and gradients. Labels
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
from pipeline.plan.names import DTYPES

__all__ = ["CHANNELS", "ChannelChoice", "choose_channels", "kind_between", "narrowed", "obstacle", "widened"]

CHANNELS = {"shm": "shared memory", "gloo": "gloo", "cuda": "CUDA peer memory", "nccl": "NCCL"}
"""What can carry messages, and how users see it called. What each reaches says ``obstacle``."""
_FASTEST_FIRST = ("cuda", "shm", "nccl", "gloo")


Worker = tuple[str, str]
"""The name of its host, and where it computes."""


@dataclass(frozen=True)
class ChannelChoice:
    """What carries the activations and the gradients of one cut, a key of ``CHANNELS``, and why."""

    kind: str
    why: str


def choose_channels(
    wanted: str, hosts: Sequence[str], replicas: int = 1, devices: Sequence[str] | None = None, nccl: bool = False
) -> tuple[ChannelChoice, ...]:
    """Choose what carries each cut: ``wanted``, or for ``auto`` the fastest that both workers can reach.

    ``hosts`` and ``devices`` (None: all on the CPU) are of every worker, and the choices of every cut, those of replica
    0 first; ``nccl``: whether torch has NCCL. PlanError: what is wanted cannot carry messages between two neighbours or
    two replicas of a stage.
    """
    stages = len(hosts) // replicas
    workers = list(zip(hosts, devices or [CPU] * len(hosts), strict=True))
    pipelines = [workers[start : start + stages] for start in range(0, len(hosts), stages)]
    pairs = [pair for pipeline in pipelines for pair in itertools.pairwise(pipeline)]
    columns = [pair for other in pipelines[1:] for pair in zip(pipelines[0], other, strict=True)]
    if wanted == "nccl" and not nccl:
        remedy = "install a build of torch with CUDA, or choose channels auto"
        raise PlanError(f"channels nccl: this torch is built without NCCL: {remedy}.")
    between = [(pair, f"the workers on both sides of cut {index % (stages - 1)}") for index, pair in enumerate(pairs)]
    for pair, who in (*between, *((pair, "replicas of a stage") for pair in columns)):
        if why := obstacle(wanted, *pair):
            raise PlanError(f"channels {wanted}: {who} {why}.")
    if wanted != "auto":
        return tuple(ChannelChoice(wanted, "as asked for") for _ in pairs)
    together = "all workers on this host" if len(set(hosts)) == 1 else "both workers on one host"
    return tuple(_chosen(one, other, together, nccl) for one, other in pairs)


def obstacle(kind: str, one: Worker, other: Worker) -> str | None:
    """Why a kind of channel cannot carry messages between two workers, and what to do; None: it can."""
    if kind in ("shm", "cuda") and one[0] != other[0]:
        return f"are on different hosts, {one[0]} and {other[0]}, which share no memory: choose channels auto or gloo"
    if kind in ("cuda", "nccl") and not (on_gpu(one[1]) and on_gpu(other[1])):
        apart = f"compute on {one[1]} and {other[1]}, and {CHANNELS[kind]} lies between GPUs"
        return f"{apart}: choose channels auto, or device cuda"
    if kind == "nccl" and one == other:
        together = f"are both on {one[1]} of {one[0]}, and NCCL refuses two on one GPU"
        return f"{together}: choose channels auto, or a device for each"
    return None


def kind_between(wanted: str, one: Worker, other: Worker, nccl: bool = False) -> str:
    """What carries messages between two workers: ``wanted``, or for ``auto`` the fastest that reaches both."""
    if wanted != "auto":
        return wanted
    return next(kind for kind in _FASTEST_FIRST if (kind != "nccl" or nccl) and obstacle(kind, one, other) is None)


def _chosen(one: Worker, other: Worker, together: str, nccl: bool) -> ChannelChoice:
    """What ``auto`` chooses between two workers."""
    kind = kind_between("auto", one, other, nccl)
    (host, device), (other_host, other_device) = one, other
    one_gpu, gpus = device == other_device, on_gpu(device) and on_gpu(other_device)
    apart = f"{host} and {other_host} are two hosts"
    whys = {
        "shm": together,
        "cuda": f"both workers on {device}" if one_gpu else f"{device} and {other_device} are on one host",
        "nccl": f"{apart}, both workers on GPUs",
        "gloo": f"{apart}, and this torch is built without NCCL" if gpus else apart,
    }
    return ChannelChoice(kind, whys[kind])


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
    for dtype in DTYPES.values():
        payload = _in_place_of(dtype, torch.float32, payload)
    return replace(message, payload=payload)


def _in_place_of(one: torch.dtype, other: torch.dtype, payload: Bundle) -> Bundle:
    return tuple([t.detach().to(other) if t is not None and t.dtype == one else t for t in payload])
