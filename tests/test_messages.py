"""What travels arrives, every dtype and shape, bit for bit, on 64 bytes each; what is no message is refused."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.messages.bundle import Bundle, Item
from pipeline.messages.message import Kind, Message, decode, dense, layout_of, write_into

DTYPES = (
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
ALIGNMENT = 64
CUT_SHORT = r"not a message, or cut short \(\d+ bytes\): "


def _tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Random bits, so infinities and NaNs come along, in any order of dimensions."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(shape), generator=generator).tolist()
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool().permute(order)
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
    return (bits.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)).permute(order)


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


tensors = st.builds(
    _tensor,
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=4),
    seed=st.integers(0, 1 << 30),
)
bundles = st.lists(st.none() | tensors, max_size=3).map(tuple)
items = st.builds(
    Item,
    batch=st.integers(0, 2**63 - 1),
    microbatch=st.integers(0, 2**16 - 1),
    session=st.integers(0, 2**16 - 1),
)
messages = st.builds(
    Message,
    kind=st.sampled_from(Kind),
    item=items,
    stage=st.integers(0, 2**16 - 1),
    payload=bundles,
    context=bundles,
    generation=st.integers(0, 2**32 - 1),
    sent_ns=st.integers(0, 2**63 - 1),
)


def _encoded(message: Message, spare: int = 0) -> bytearray:
    layout = layout_of(message)
    buffer = bytearray(layout.total_bytes + spare)
    write_into(memoryview(buffer), message, layout)
    return buffer


def _decoded(content: bytes | bytearray) -> Message:
    return decode(memoryview(bytearray(content)))


@settings(deadline=None, max_examples=200)
@given(message=messages, spare=st.integers(0, 200))
def test_a_message_arrives_as_it_was_sent(message: Message, spare: int) -> None:
    arrived = _decoded(_encoded(message, spare))
    assert replace(arrived, payload=(), context=()) == replace(message, payload=(), context=())
    assert (type(arrived.kind), type(arrived.item)) == (Kind, Item)
    assert _places(arrived) == _places(message)
    for mine, sent in zip(arrived.tensors, message.tensors, strict=True):
        assert (mine.dtype, mine.shape) == (sent.dtype, sent.shape)
        assert not mine.numel() or mine.stride() == dense(sent).stride()
        assert _bits(mine) == _bits(sent)


def _places(message: Message) -> list[list[bool]]:
    """Where payload and context have a tensor."""
    return [[tensor is not None for tensor in bundle] for bundle in (message.payload, message.context)]


ONE, TWO = torch.ones(2), torch.arange(3)


@pytest.mark.parametrize(
    ("payload", "context"),
    [
        ((), ()),
        ((None,), ()),
        ((), (None,)),
        ((ONE, None, TWO), (None, ONE)),
        ((None, None), (TWO, TWO, None)),
        ((ONE,) * 255, (None,) * 255),
    ],
    ids=["nothing", "a place", "a place beside it", "gaps", "only the context", "as many as a header counts"],
)
def test_places_without_a_tensor_arrive_without_one(payload: Bundle, context: Bundle) -> None:
    """The gradient of (x, mask) is (dL/dx, None): who takes it finds both in their places."""
    message = Message(Kind.GRADIENT, Item(3, 1), 1, payload, context)
    arrived = _decoded(_encoded(message))
    assert _places(arrived) == _places(message)
    assert [tensor.tolist() for tensor in arrived.tensors] == [tensor.tolist() for tensor in message.tensors]


@pytest.mark.parametrize("field", ["payload", "context"])
def test_more_tensors_than_a_header_counts_are_refused(field: str) -> None:
    with pytest.raises(struct.error):
        layout_of(Message(Kind.ACTIVATION, Item(0), 0, **{field: (None,) * 256}))  # type: ignore[arg-type]


def test_the_key_of_a_piece_of_work_travels_whole() -> None:
    """Batch, microbatch and session, and the generation of the workers beside them."""
    arrived = _decoded(_encoded(Message(Kind.AWAITED, Item(7, 2, 5), 3, generation=4, sent_ns=6)))
    assert (arrived.item, arrived.batch, str(arrived.item)) == (Item(7, 2, 5), 7, "7.2.5")
    assert (arrived.stage, arrived.generation, arrived.sent_ns) == (3, 4, 6)
    assert str(Item(7, 2)) == "7.2", "a session is told where there are any"


def test_other_tensors_take_the_same_places() -> None:
    message = Message(Kind.ACTIVATION, Item(2), 0, (None, ONE), (TWO, None), generation=1)
    held = message.holding(tensor + 1 for tensor in message.tensors)
    assert _places(held) == _places(message)
    assert [tensor.tolist() for tensor in held.tensors] == [[2.0, 2.0], [1, 2, 3]]
    assert replace(held, payload=(), context=()) == replace(message, payload=(), context=())


@settings(deadline=None, max_examples=100)
@given(message=messages)
def test_every_tensor_begins_on_64_bytes_behind_the_one_before(message: Message) -> None:
    layout = layout_of(message)
    end = len(layout.header)
    for tensor, offset in zip(message.tensors, layout.offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert end <= offset < end + ALIGNMENT
        end = offset + tensor.numel() * tensor.element_size()
    assert end <= layout.total_bytes < end + ALIGNMENT
    assert layout.total_bytes % ALIGNMENT == 0


def test_a_message_is_read_in_place() -> None:
    """The tensors of a decoded message are the bytes of the buffer, not a copy."""
    buffer = _encoded(Message(Kind.GRADIENT, Item(3), 1, (torch.zeros(4),)))
    message = decode(memoryview(buffer))
    message.tensors[0][2] = 1.0
    assert struct.unpack_from("<4f", buffer, ALIGNMENT) == (0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("tensor", "strides"),
    [
        (torch.arange(12.0).view(3, 4).t(), (1, 4)),
        (torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1), (1, 12, 4)),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), (60, 1, 15, 3)),
        (torch.ones(2, 1, 4, 5).to(memory_format=torch.channels_last), (20, 1, 5, 1)),
        (torch.ones(2, 1, 4, 5), (20, 20, 5, 1)),
        (torch.ones(1, 7).t(), (1, 7)),
        (torch.arange(12.0)[::3], (1,)),
        (torch.arange(12.0).view(3, 4)[:, 1:3], (2, 1)),
        (torch.arange(12.0).view(3, 4)[:, 1:3].t(), (1, 2)),
        (torch.ones(1).expand(3, 4), (4, 1)),
        (torch.nn.Parameter(torch.ones(3)), (1,)),
        (torch.tensor(7), ()),
        (torch.empty(0, 3), (3, 1)),
    ],
    ids=[
        "transposed",
        "permuted",
        "channels last",
        "one channel last",
        "one channel",
        "transposed row",
        "every third",
        "slice",
        "transposed slice",
        "expanded",
        "with gradient",
        "0-dim",
        "empty",
    ],
)
def test_a_tensor_may_lie_in_memory_as_it_likes(tensor: Tensor, strides: tuple[int, ...]) -> None:
    """Behind a transposition the stage above once computed on other strides than one process, so it rounded otherwise.

    What is dense arrives with its strides, the rest dense, in the same order; in the reference driver too.
    """
    (arrived,) = _decoded(_encoded(Message(Kind.ACTIVATION, Item(0), 0, (tensor,)))).tensors
    assert not arrived.requires_grad
    assert (arrived.stride(), dense(tensor).stride()) == (strides, strides)
    assert torch.equal(arrived, tensor.detach())
    assert torch.equal(dense(tensor), tensor.detach())


def test_writing_touches_nothing_behind_the_message() -> None:
    message = Message(Kind.ACTIVATION, Item(1), 2, (torch.ones(3), torch.ones(5, dtype=torch.int8)))
    layout = layout_of(message)
    buffer = bytearray(b"\xaa" * (layout.total_bytes + 40))
    write_into(memoryview(buffer), message, layout)
    assert buffer[layout.total_bytes :] == b"\xaa" * 40


# ---------------------------------------------------------------- what is no message


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e5m2], ids=str)
def test_a_dtype_that_cannot_travel_is_named(dtype: torch.dtype) -> None:
    message = Message(Kind.GRADIENT, Item(0), 0, (torch.ones(2), torch.zeros(2).to(dtype)))
    with pytest.raises(TypeError, match=f"cannot send dtype {dtype}: one of torch.float32, .*torch.bool can travel"):
        layout_of(message)


def _bytes_of_tensors(content: bytes | bytearray) -> int:
    """Bytes that a decoded message gives access to; 0 when it is refused."""
    try:
        return sum(tensor.numel() * tensor.element_size() for tensor in _decoded(content).tensors)
    except ValueError:
        return 0


@settings(deadline=None, max_examples=300)
@given(content=st.binary(max_size=200))
def test_garbage_is_no_message(content: bytes) -> None:
    """Whatever the bytes say: a ValueError, or a message whose tensors lie within them."""
    assert _bytes_of_tensors(content) <= len(content)


def test_every_cut_of_a_message_is_refused() -> None:
    message = Message(Kind.ACTIVATION, Item(5), 1, (torch.ones(2, 3), torch.ones(40, dtype=torch.int64)))
    content = bytes(_encoded(message))
    end = layout_of(message).offsets[-1] + 40 * 8  # what follows only fills up the 64 bytes
    for length in range(end):
        with pytest.raises(ValueError, match=CUT_SHORT):
            _decoded(content[:length])
    assert torch.equal(_decoded(content[:end]).tensors[0], torch.ones(2, 3))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(data: st.DataObject) -> None:
    message = Message(Kind.ACTIVATION, Item(5), 1, (torch.ones(2, 3), torch.ones(4, dtype=torch.int64)))
    content = _encoded(message)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(layout_of(message).header) - 1))] = data.draw(st.integers(0, 255))
    assert _bytes_of_tensors(content) <= len(content)


def _with_shape(*shape: int, dtype_code: int = 0, kind: int = Kind.GRADIENT, order: tuple[int, ...] = ()) -> bytes:
    """A message of one tensor that claims this shape, followed by a kilobyte."""
    record = bytearray(layout_of(Message(Kind.GRADIENT, Item(0), 0)).header)
    record[:3] = kind, 1, 0
    dims = b"".join(struct.pack("<q", size) for size in shape)
    spec = struct.pack("<BB", dtype_code, len(shape)) + dims + bytes(order or range(len(shape)))
    return bytes(record) + spec + bytes(1024)


def test_a_header_made_by_hand_is_like_a_real_one() -> None:
    (tensor,) = _decoded(_with_shape(2, 3, dtype_code=4)).tensors
    assert (tensor.dtype, tensor.shape) == (torch.int64, (2, 3))


@pytest.mark.parametrize(
    "content",
    [
        _with_shape(1 << 62),
        _with_shape(1 << 61),
        _with_shape(1 << 62, 1 << 62),
        _with_shape(0, 1 << 62, 1 << 62),
        _with_shape(1 << 40),
        _with_shape(-1),
        _with_shape(-2, -3),
        _with_shape(-1, 0),
        _with_shape(2, 3, order=(1, 1)),
        _with_shape(2, 3, order=(1, 2)),
        _with_shape(2, dtype_code=len(DTYPES)),
        _with_shape(2, kind=0),
        _with_shape(2, kind=len(Kind) + 1),
    ],
    ids=[
        "overflow of the size",
        "overflow of the bytes",
        "overflow of the product",
        "overflow of the strides",
        "larger than the buffer",
        "negative",
        "negative twice",
        "negative and empty",
        "dimension twice",
        "unknown dimension",
        "dtype",
        "kind 0",
        "kind 6",
    ],
)
def test_absurd_headers_are_refused(content: bytes) -> None:
    """A size of 2**62 floats once gave a tensor far beyond the buffer: torch's own check overflows."""
    with pytest.raises(ValueError, match=CUT_SHORT):
        _decoded(content)


@pytest.mark.parametrize(
    "field",
    [
        {"item": Item(1 << 63)},
        {"item": Item(0, 1 << 16)},
        {"item": Item(0, 0, 1 << 16)},
        {"stage": -1},
        {"stage": 1 << 16},
        {"generation": 1 << 32},
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_not_cut(field: dict[str, Any]) -> None:
    with pytest.raises(struct.error):
        layout_of(Message(**{"kind": Kind.END, "item": Item(0), "stage": 0, **field}))
