"""What travels between stages: a typed record followed by raw tensor bytes. No pickle.

    | header: kind counts stage ... sent | per tensor: dtype ndim dims order | pad | bytes | pad | bytes |
                                                                                   ^ every tensor starts on 64 bytes

A tensor arrives dense, with the order its dimensions have in memory (transposed, channels last): kernels round by it.

An activation carries the output of the stage below, and the labels as its context. A gradient carries one tensor for
each differentiable one of the activation.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pipeline.messages.bundle import Bundle, Item

__all__ = ["ALIGNMENT_BYTES", "Kind", "Layout", "Message", "decode", "decode_over", "dense", "layout_of", "write_into"]

ALIGNMENT_BYTES = 64
_HEADER = struct.Struct("<BBBHIqHHq")  # kind, tensors of payload and context, stage, generation, item, sent
_TENSOR = struct.Struct("<BB")  # dtype code, number of dimensions

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_DTYPES = (*_FLOATS, *_INTEGERS, torch.bool)
_CODE = {dtype: code for code, dtype in enumerate(_DTYPES)}
_NOTHING = 255
"""Stands for the dtype of a place without a tensor."""


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
    """One message from a stage about a piece of work; what is in its context rides along."""

    kind: Kind
    item: Item
    stage: int
    payload: Bundle = ()
    context: Bundle = ()
    generation: int = 0  # counts restarts; the sending end of a channel sets it, the receiving one checks it
    sent_ns: int = 0  # on the common clock; 0 where nobody needs to know

    @property
    def batch(self) -> int:
        """The batch id of its item."""
        return self.item.batch

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are there: of the payload, then of the context."""
        return tuple([tensor for tensor in (*self.payload, *self.context) if tensor is not None])

    def holding(self, tensors: Iterable[Tensor]) -> Message:
        """The same message with others in the places of ``tensors``, in their order."""
        rest = iter(tensors)
        payload = tuple([None if tensor is None else next(rest) for tensor in self.payload])
        context = tuple([None if tensor is None else next(rest) for tensor in self.context])
        return replace(self, payload=payload, context=context)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of an encoded message lie: its header, and the byte offset of every tensor."""

    header: bytes
    offsets: tuple[int, ...]
    total_bytes: int


def layout_of(message: Message) -> Layout:
    """Plan the bytes of a message: header, then each tensor at a multiple of 64 bytes. TypeError: a dtype that does not
    travel.
    """
    m, counts = message, (len(message.payload), len(message.context))
    parts = [_HEADER.pack(m.kind, *counts, m.stage, m.generation, *m.item, m.sent_ns)]
    for tensor in (*m.payload, *m.context):
        if tensor is None:
            parts.append(_TENSOR.pack(_NOTHING, 0))
            continue
        code = _CODE.get(tensor.dtype)
        if code is None:
            raise TypeError(f"cannot send dtype {tensor.dtype}: one of {', '.join(map(str, _DTYPES))} can travel")
        parts.append(_TENSOR.pack(code, tensor.dim()))
        parts.append(_dimensions(tensor.dim()).pack(*tensor.shape, bytes(_order(tensor))))
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
    """Read a message in place: its tensors share the memory of ``buffer`` and are valid as long as that is. ValueError:
    the bytes are no message of ours, or are cut short.
    """
    try:
        return _read(buffer, partial(_view, buffer))
    except (struct.error, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"not a message, or cut short ({len(buffer)} bytes): {error}") from error


def decode_over(header: memoryview, memory: Tensor) -> Message:
    """A message whose header lies in one place, and all its bytes in another, ``memory`` [bytes] uint8 on any device;
    its tensors are in place. ValueError: the message does not fit the memory.
    """

    def view(start: int, dtype: torch.dtype, shape: tuple[int, ...], order: bytes) -> Tensor:
        end = start + math.prod(shape) * dtype.itemsize
        if end > len(memory):
            raise ValueError(f"{list(shape)} {dtype} at byte {start} does not fit {len(memory):,} bytes")
        return _laid(memory[start:end].view(dtype), shape, order)

    return _read(header, view)


def _read(header: memoryview, view: Callable[[int, torch.dtype, tuple[int, ...], bytes], Tensor]) -> Message:
    """The message of a header; ``view`` gives the tensor that begins at a byte."""
    kind, num_payload, num_context, stage, generation, *item, sent_ns = _HEADER.unpack_from(header, 0)
    specs, end = list[tuple[torch.dtype, tuple[int, ...], bytes] | None](), _HEADER.size
    for _ in range(num_payload + num_context):
        code, num_dims = _TENSOR.unpack_from(header, end)
        dimensions = _dimensions(num_dims)
        *shape, order = dimensions.unpack_from(header, end + _TENSOR.size)
        end += _TENSOR.size + dimensions.size
        if sorted(order) != list(range(num_dims)):
            raise ValueError(f"{list(order)} is no order of {num_dims} dimensions")
        specs.append(None if code == _NOTHING else (_DTYPES[code], tuple(shape), order))
    places: list[Tensor | None] = []
    for spec in specs:
        if spec is not None:
            start = _aligned(end)
            tensor = view(start, *spec)
            end = start + tensor.numel() * tensor.element_size()
        places.append(None if spec is None else tensor)
    payload, context = tuple(places[:num_payload]), tuple(places[num_payload:])
    return Message(Kind(kind), Item(*item), stage, payload, context, generation, sent_ns)


def _dimensions(count: int) -> struct.Struct:
    """Sizes of the dimensions, and their order in memory."""
    return struct.Struct(f"<{count}q{count}s")


def _order(tensor: Tensor) -> Sequence[int]:
    """The dimensions of a tensor from the one with the largest stride to that with the smallest."""
    sizes, strides = tensor.shape, tensor.stride()
    return sorted(range(tensor.dim()), key=lambda i: (-strides[i], sizes[i] == 1))


def _laid(flat: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """A dense tensor over ``flat`` [numel], its dimensions in memory in this order."""
    places = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[dimension] for dimension in order]).permute(places)


def _view(buffer: memoryview, offset: int, dtype: torch.dtype, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    if min(shape, default=0) < 0:
        raise ValueError(f"negative size in shape {shape}")
    if not (count := math.prod(shape)):
        return torch.empty(shape, dtype=dtype)
    if count * dtype.itemsize > len(buffer) - offset:  # torch's own check overflows with absurd sizes
        raise ValueError(f"{list(shape)} {dtype} at byte {offset} does not fit")
    return _laid(torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset), shape, order)


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
