"""Which channel a cut gets, and what travels on it: choices that need no process to be made.

    workers of one host        shared memory, the cheapest way there is
    workers of two hosts       gloo: TCP, by torch.distributed

A wire dtype narrows the first tensor of a message, the activation or the gradient, and only if it is float32. Labels
travel as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.errors import PlanError
from pipeline.messages import Message

__all__ = ["CHANNELS", "WIRE_DTYPES", "ChannelChoice", "choose_channels", "kind_between", "narrowed", "widened"]

CHANNELS = {"shm": "shared memory", "gloo": "gloo"}
"""What can carry messages, and how users see it called."""
WIRE_DTYPES = {"bf16": torch.bfloat16}
"""What float32 may be narrowed to on its way."""


@dataclass(frozen=True)
class ChannelChoice:
    """What carries the activations and the gradients of one cut.

    Attributes:
        kind: a key of ``CHANNELS``.
        why: the reason, for the first screen.
    """

    kind: str
    why: str


def choose_channels(wanted: str, hosts: Sequence[str], replicas: int = 1) -> tuple[ChannelChoice, ...]:
    """Choose what carries each cut.

    Args:
        wanted: a key of ``CHANNELS`` for all cuts, or ``auto``: shared memory wherever both workers share a host.
        hosts: name of the host of every worker, those of replica 0 first.
        replicas: of the pipeline.

    Returns:
        one choice per cut, those of replica 0 first.

    Raises:
        PlanError: shared memory between two hosts.
    """
    stages = len(hosts) // replicas
    pipelines = [hosts[start : start + stages] for start in range(0, len(hosts), stages)]
    pairs = [pair for pipeline in pipelines for pair in itertools.pairwise(pipeline)]
    columns = [pipelines[0][k] != other[k] for other in pipelines for k in range(stages)]
    if wanted == "shm" and any(columns):
        raise PlanError(
            "channels shm: replicas of a stage are on different hosts, which share no memory: choose channels auto or "
            "gloo."
        )
    if wanted == "shm" and (apart := [k for k, (one, other) in enumerate(pairs) if one != other]):
        raise PlanError(
            f"channels shm: the workers on both sides of cut {apart[0] % (stages - 1)} are on different hosts, "
            f"{' and '.join(pairs[apart[0]])}, which share no memory: choose channels auto or gloo."
        )
    if wanted != "auto":
        return tuple(ChannelChoice(wanted, "as asked for") for _ in pairs)
    together = "all workers on this host" if len(set(hosts)) == 1 else "both workers on one host"
    return tuple(
        ChannelChoice("shm", together) if one == other else ChannelChoice("gloo", f"{one} and {other} are two hosts")
        for one, other in pairs
    )


def kind_between(wanted: str, one: str, other: str) -> str:
    """What carries messages between workers on two hosts: a key of ``CHANNELS``.

    Args:
        wanted: a key of ``CHANNELS``, or ``auto``.
        one: name of a worker's host.
        other: name of the other's.
    """
    if wanted != "auto":
        return wanted
    return "shm" if one == other else "gloo"


def narrowed(message: Message, wire_dtype: torch.dtype | None) -> Message:
    """The message as it travels: its first tensor in ``wire_dtype`` if it is float32; the very message else."""
    if wire_dtype is None or not message.tensors or message.tensors[0].dtype != torch.float32:
        return message
    first, *rest = message.tensors
    return replace(message, tensors=(first.detach().to(wire_dtype), *rest))


def widened(message: Message) -> Message:
    """A narrowed message as it is received: its first tensor in float32 again, rounded to what travelled."""
    first, *rest = message.tensors
    return replace(message, tensors=(first.float(), *rest))
