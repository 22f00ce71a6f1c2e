"""What travels between stages: a typed record followed by raw tensor bytes. No pickle.

    | header: kind count stage ... sent | per tensor: dtype ndim dims order | pad | bytes | pad | bytes |
                                                                                  ^ every tensor starts on 64 bytes

A tensor arrives with the order its dimensions have in memory (transposed, channels last), since kernels round by it.
Gaps (a slice of columns) and repetitions (an expanded tensor) do not travel: it arrives dense.

An activation carries (h, y): the output of the stage below and the labels. A gradient carries (g,).
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALIGNMENT_BYTES", "Kind", "Layout", "Message", "decode", "dense", "layout_of", "tensors_over", "write_into"]

ALIGNMENT_BYTES = 64
_HEADER = struct.Struct("<BBHIqHq")  # kind, number of tensors, stage, generation, batch id, microbatch, sent
_TENSOR = struct.Struct("<BB")  # dtype code, number of dimensions
_DIMENSION = struct.Struct("<q")

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_CODE = {dtype: code for code, dtype in enumerate(_DTYPES)}


class Kind(enum.IntEnum):
    """What a message is. GRADIENT and SAMPLE go back, shares to other replicas; the rest flows down, END is echoed."""

    ACTIVATION = 1
    GRADIENT = 2
    EVALUATION = 3  # an activation of a held-out batch: no gradient comes back
    REPORT = 4  # ends one pass over the held-out batches; `batch` is the number of updates before it
    END = 5
    SAMPLE = 6  # the true gradient of a sampled batch: nothing learns from it, it judges the synthetic ones
    TRAINED = 7  # no training batch follows; sent where replicas have their weights to average then
    SHARE = 8  # what a replica gives for an average; `batch` is the number of the round, `stage` the replica
    LAST_SHARE = 9  # as SHARE, and nothing follows
    AWAITED = 10  # as ACTIVATION, from a stage that is locked: it waits for the gradient of the whole batch
    DROPPED = 11  # goes back: targets were dropped, and none of a batch older than `batch` follows


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        kind: what it is.
        batch: the batch id it belongs to.
        stage: index of the sender.
        tensors: payload, any shapes; (h, y) or (g,) or nothing.
        generation: counts restarts, so that a message from before a restart is recognised.
        microbatch: which part of the batch, in modes that cut batches.
        sent_ns: when it was sent, on the common clock; 0 where nobody needs to know.
    """

    kind: Kind
    batch: int
    stage: int
    tensors: tuple[Tensor, ...] = ()
    generation: int = 0
    microbatch: int = 0
    sent_ns: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of an encoded message lie.

    Attributes:
        header: the typed record.
        offsets: byte offset of every tensor.
        total_bytes: what a slot must hold.
    """

    header: bytes
    offsets: tuple[int, ...]
    total_bytes: int


def layout_of(message: Message) -> Layout:
    """Plan the bytes of a message: header, then each tensor at a multiple of 64 bytes.

    Raises:
        TypeError: a tensor's dtype is not one that travels.
    """
    m = message
    parts = [_HEADER.pack(m.kind, len(m.tensors), m.stage, m.generation, m.batch, m.microbatch, m.sent_ns)]
    for tensor in message.tensors:
        code = _CODE.get(tensor.dtype)
        if code is None:
            raise TypeError(f"cannot send dtype {tensor.dtype}: one of {', '.join(map(str, _DTYPES))} can travel")
        parts.append(_TENSOR.pack(code, tensor.dim()))
        parts.extend(_DIMENSION.pack(size) for size in tensor.shape)
        parts.append(bytes(_order(tensor)))
    header = b"".join(parts)
    offsets, end = [], len(header)
    for tensor in message.tensors:
        start = _aligned(end)
        offsets.append(start)
        end = start + tensor.numel() * tensor.element_size()
    return Layout(header, tuple(offsets), _aligned(end))


def write_into(buffer: memoryview, message: Message, layout: Layout) -> None:
    """Copy the message into ``buffer`` (at least ``layout.total_bytes`` long): one copy per tensor."""
    buffer[: len(layout.header)] = layout.header
    for tensor, offset in zip(message.tensors, layout.offsets, strict=True):
        if tensor.numel():
            _view(buffer, offset, tensor.dtype, tensor.shape, _order(tensor)).copy_(tensor.detach())


def dense(tensor: Tensor) -> Tensor:
    """A copy of a tensor as it arrives: the order of its dimensions in memory is kept, gaps and repetitions are not."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return _laid(flat, tensor.shape, _order(tensor)).copy_(tensor.detach())


def decode(buffer: memoryview) -> Message:
    """Read a message in place: its tensors share the memory of ``buffer`` and are valid as long as that is.

    Raises:
        ValueError: the bytes are no message of ours, or are cut short.
    """
    try:
        kind, count, stage, generation, batch, microbatch, sent_ns = _HEADER.unpack_from(buffer, 0)
        specs, end = _specs(buffer, count)
        tensors = []
        for dtype, shape, order in specs:
            start = _aligned(end)
            tensors.append(_view(buffer, start, dtype, shape, order))
            end = start + tensors[-1].numel() * dtype.itemsize
        return Message(Kind(kind), batch, stage, tuple(tensors), generation, microbatch, sent_ns)
    except (struct.error, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"not a message, or cut short ({len(buffer)} bytes): {error}") from error


def tensors_over(header: memoryview, memory: Tensor) -> tuple[Tensor, ...]:
    """The tensors of a message whose header lies in one place and whose bytes in another, in place.

    Args:
        header: begins with the header of an encoded message.
        memory: [bytes] uint8, on any device; stands for the message's bytes from the first on, header included.

    Raises:
        ValueError: the message does not fit the memory.
    """
    specs, end = _specs(header, _HEADER.unpack_from(header, 0)[1])
    tensors = []
    for dtype, shape, order in specs:
        start = _aligned(end)
        end = start + math.prod(shape) * dtype.itemsize
        if end > len(memory):
            raise ValueError(f"{list(shape)} {dtype} at byte {start} does not fit {len(memory):,} bytes")
        tensors.append(_laid(memory[start:end].view(dtype), shape, order))
    return tuple(tensors)


def _specs(buffer: memoryview, count: int) -> tuple[list[tuple[torch.dtype, tuple[int, ...], bytes]], int]:
    """Dtypes, shapes and orders of a message's tensors, and where its header ends."""
    position, specs = _HEADER.size, []
    for _ in range(count):
        code, num_dims = _TENSOR.unpack_from(buffer, position)
        position += _TENSOR.size
        shape = tuple(_DIMENSION.unpack_from(buffer, position + i * _DIMENSION.size)[0] for i in range(num_dims))
        position += num_dims * _DIMENSION.size
        order = bytes(buffer[position : position + num_dims])
        position += num_dims
        if sorted(order) != list(range(num_dims)):
            raise ValueError(f"{list(order)} is no order of {num_dims} dimensions")
        specs.append((_DTYPES[code], shape, order))
    return specs, position


def _order(tensor: Tensor) -> Sequence[int]:
    """The dimensions of a tensor from the one with the largest stride to that with the smallest."""
    sizes, strides = tensor.shape, tensor.stride()
    return sorted(range(tensor.dim()), key=lambda i: (-strides[i], sizes[i] == 1))


def _laid(flat: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """A dense tensor over ``flat`` [numel], its dimensions in memory in this order."""
    places = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[dimension] for dimension in order]).permute(places)


def _view(buffer: memoryview, offset: int, dtype: torch.dtype, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    count = 1
    for size in shape:
        if size < 0:
            raise ValueError(f"negative size in shape {shape}")
        count *= size
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if count * dtype.itemsize > len(buffer) - offset:  # torch's own check overflows with absurd sizes
        raise ValueError(f"{list(shape)} {dtype} at byte {offset} does not fit")
    return _laid(torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset), shape, order)


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
