"""The channel of an edge, and what a process opens its end of it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.plan.device_choice import CPU
from pipeline.plan.topology import Edge
from workers.channels.names import Meeting
from workers.channels.staging import DeviceStaging
from workers.channels.wakeup import WakeUp

__all__ = ["ChannelSpec", "Opening"]


@dataclass(frozen=True)
class ChannelSpec:
    """The bounded channel of one edge. Can be sent to any process.

    Attributes:
        kind: what carries it, a key of ``pipeline.plan.channel_choice.CHANNELS``.
        name: under which both ends find each other on one host.
        label: what errors call it, like ``"activations 0->1"``.
        slots: how many messages fit.
        slot_bytes: bytes of the largest encoded message (``layout_of(message).total_bytes``, as narrowed).
        wire_dtype: what float32 activations and gradients are narrowed to on their way; None: they travel as they are.
        source_device: where the sender computes; the receiver on ``target_device``.
        generation: how often the workers were started anew; ends stamp messages with it, and take no others.
    """

    edge: Edge
    kind: str
    name: str
    label: str
    slots: int
    slot_bytes: int
    wire_dtype: torch.dtype | None = None
    source_device: str = CPU
    target_device: str = CPU
    generation: int = 0

    @property
    def meets_as(self) -> str:
        """Under which its ends find each other at the run's rendezvous, if they meet there."""
        return f"{self.label}, generation {self.generation}"


@dataclass(frozen=True)
class Opening:
    """What a process opens one end with.

    Attributes:
        within_s: how long to look for what is to be there, in seconds.
        bell: the bell of a worker, for those that the end rings.
        meeting: where processes without common memory meet; None where every channel is in shared memory.
        staging: of the device where this end's worker computes, closed with the end; None: on the CPU.
    """

    within_s: float
    bell: Callable[[int], WakeUp | None] = lambda worker: None
    meeting: Meeting | None = None
    staging: DeviceStaging | None = None
