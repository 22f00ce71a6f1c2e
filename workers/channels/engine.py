"""What channels need of a device: copies beside the computing, memory and events other processes open, a link.

`workers.channels.gpu.cuda_engine` has that of CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from workers.channels.names import Meeting

__all__ = ["DeviceLink", "Done", "Engine", "Signal"]


class Done(Protocol):
    """A point in the work of a device."""

    def synchronize(self) -> None:
        """Wait until the device has come there; lets other threads run."""


class Signal(Protocol):
    """An event that processes share: recorded by the receiver, waited for by the sender's device."""


class DeviceLink(Protocol):
    """Carries bytes from one device to another: one direction, in order, beside the computing."""

    is_cut: bool

    def send(self, payload: Tensor) -> Done:
        """Queue sending [bytes] uint8, at least one, that are there; does not block.

        What is returned is done when the memory may be written to again. Both raise ``PairBroken`` where the link
        failed, or is cut.
        """

    def receive(self, payload: Tensor) -> Done:
        """Queue receiving as many bytes as the other side sends; else as ``send``."""

    def cut(self) -> None:
        """End what is under way, for good; from any thread. What was being received is garbage, and nobody is told.

        Blocks until the device is free of it, a few seconds at most.
        """


class Engine(Protocol):
    """One stream of a device that copies, beside the one that computes; of one end of a channel alone."""

    def empty(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 on the device."""

    def pin(self, memory: memoryview) -> Callable[[], None]:
        """Have the device copy to and from host memory by itself; returns what ends that."""

    def snapshot(self, into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Copy on the computing stream; later copies wait for it."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy on the copying stream."""

    def fetch(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """New tensors on the device, copied on the copying stream; the computing stream waits for it."""

    def mark(self) -> Done:
        """Where the copying stream is now."""

    def shareable(self, num_bytes: int) -> tuple[Tensor, bytes]:
        """[num_bytes] uint8 on the device until the process ends, and a handle for others, at most 255 bytes."""

    def opened(self, handle: bytes, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 that an engine of any process shares; ``RuntimeError``: this device cannot reach them."""

    def signal(self) -> tuple[Signal, bytes]:
        """A new event, and its handle of 64 bytes."""

    def opened_signal(self, handle: bytes) -> Signal:
        """The event that another engine made."""

    def record(self, signal: Signal) -> None:
        """The copying stream is here."""

    def wait(self, signal: Signal) -> None:
        """The copying stream goes on when the last ``record`` before this call is reached; the host does not wait."""

    def wire(self, meeting: Meeting, name: str, side: int, within_s: float) -> DeviceLink:
        """Connect to the device of the process that asks for the other side (0 sends, 1 receives) of the same name.

        Raises:
            ChannelTimeout: they were not connected within ``within_s`` seconds, which is how long this blocks.
            RuntimeError: these two devices cannot be connected.
        """
