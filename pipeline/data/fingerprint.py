"""What a stage begins with, as a few numbers per tensor, so that two processes can compare what they have built.

recipe --> layers, weights, first batches, what layers and loss give for a fixed input --> name: Sketch

Every process makes the recipe for itself. Values that the program has set since, random numbers that the seed does not
give, or other data make another model of it, which trains without an error.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.data.recipe import Batch, Recipe
from pipeline.model.partition import Layer
from pipeline.seeding import derived_seed, seeded

if TYPE_CHECKING:
    from pipeline.run.resolve import Resolved

__all__ = ["Sketch", "differences", "fingerprint", "first_two"]

_BLOCK = 1 << 18
_CLOSE, _CLOSE_COMPUTED = 1e-5, 1e-3  # what other threads and processors may round differently
_ROWS = 2
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Sketch:
    """A tensor, or a layer's description, small enough to be sent.

    Attributes:
        kind: shape and dtype; of a layer, what it prints as.
        digest: of what has to be equal bit for bit; empty for floating point.
        total: the sum of floating-point values, each times a fixed weight in [-1, 1].
        size: the sum of their absolute values.
        computed: whether the values come out of layers or the loss, and so round more.
    """

    kind: str
    digest: str = ""
    total: float = 0.0
    size: float = 0.0
    computed: bool = False


def fingerprint(
    recipe: Recipe, resolved: Resolved, index: int, layers: Sequence[Layer], replica: int = 0
) -> dict[str, Sketch]:
    """Sketches of one stage as it is before training. Works on copies: the layers stay as they are.

    Args:
        recipe: what this process has made of it.
        resolved: the run.
        index: the stage.
        layers: its layers, freshly built.
        replica: only the first one looks at the held-out batches.
    """
    seed, last = resolved.plan.seed, index == resolved.plan.stages - 1
    found = dict(_layers(layers))
    if index == 0:
        first = recipe.seeded_batch(seed, 0)
        found |= _batch("batch 0", first)
        if replica == 0:
            found |= _batch("held-out batch 0", next(recipe.held_out(), ()))
        rows = first[0][:_ROWS].clone()
    else:
        below = resolved.cuts[index - 1]
        rows = _fixed(seed, below.activation_shape).to(below.activation_dtype)
    # What takes no two rows is left out, in every process alike.
    with contextlib.suppress(Exception), seeded(seed, "fingerprint"), torch.no_grad():
        for layer in copy.deepcopy(list(layers)):
            rows = layer.module(rows)
            found[f"what layer {layer.name} gives"] = _sketch(rows, computed=True)
    if last:
        with contextlib.suppress(Exception), seeded(seed, "fingerprint"), torch.no_grad():
            loss = recipe.loss(_fixed(seed, resolved.output_shape).abs(), load(resolved.two_labels)["labels"])
            found["the loss of a fixed output"] = _sketch(loss, computed=True)
    return found


def first_two(labels: Tensor) -> bytes:
    """The labels of two rows, as bytes; none where they cannot be that."""
    with contextlib.suppress(Exception):
        return save({"labels": labels[:_ROWS].detach().clone(memory_format=torch.contiguous_format)})
    return b""


def differences(expected: Mapping[str, Sketch], built: Mapping[str, Sketch]) -> Iterator[str]:
    """Where what a stage has built differs from what is expected of it, one clause each.

    What layers and loss give is only told where all that they were given is the same.

    Args:
        expected: the stage's sketches as this process made them.
        built: as its worker made them.
    """
    told = False
    for name in [*expected, *(name for name in built if name not in expected)]:
        here, there = expected.get(name), built.get(name)
        if here == there or ((here or there or Sketch("")).computed and (told or here is None or there is None)):
            continue
        if here is None or there is None or here.kind != there.kind:
            yield f"{name} is {_kind(here)} here, {_kind(there)} in the worker"
        elif _alike(here, there):
            continue
        elif here.kind.startswith("[] ") and not here.digest:
            yield f"{name} is {here.total:.6g} here, {there.total:.6g} in the worker"
        else:
            yield f"{name}: other values in the worker"
        told = True


def _kind(sketch: Sketch | None) -> str:
    return "not there" if sketch is None else sketch.kind


def _alike(one: Sketch, other: Sketch) -> bool:
    within = (_CLOSE_COMPUTED if one.computed else _CLOSE) * max(one.size, other.size)
    pairs = ((one.total, other.total), (one.size, other.size))
    same = all(a == b or abs(a - b) <= within or (math.isnan(a) and math.isnan(b)) for a, b in pairs)
    return same and one.digest == other.digest


def _layers(layers: Sequence[Layer]) -> Iterator[tuple[str, Sketch]]:
    for layer in layers:
        yield f"layer {layer.name}", Sketch(" ".join(_ADDRESS.sub("", repr(layer.module)).split()))
        for name, tensor in (*layer.module.named_parameters(), *layer.module.named_buffers()):
            yield f"{layer.name}.{name}", _sketch(tensor)


def _batch(name: str, batch: Batch | tuple[()]) -> dict[str, Sketch]:
    return {f"{part} of {name}": _sketch(tensor) for part, tensor in zip(("inputs", "labels"), batch, strict=False)}


def _sketch(tensor: Tensor, computed: bool = False) -> Sketch:
    """Walks through it in blocks, at about 1 GB/s."""
    kind = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    bare = (tensor if tensor.layout == torch.strided else tensor.to_dense()).detach().cpu()
    flat = (torch.view_as_real(bare) if bare.is_complex() else bare).reshape(-1)
    if not flat.is_floating_point():
        return Sketch(kind, hashlib.blake2b(flat.numpy().tobytes(), digest_size=16).hexdigest(), computed=computed)
    total = size = 0.0
    for index, block in enumerate(flat.split(_BLOCK)):
        values = block.double()
        total += float(values @ _weights()[: len(values)]) / (1 + index % 7)  # blocks that change places are seen
        size += float(values.abs().sum())
    return Sketch(kind, "", total, size, computed)


@cache
def _weights() -> Tensor:
    weights = 2 * torch.rand(_BLOCK, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    weights[0] = 1.0  # a single number is its own sketch
    return weights


def _fixed(seed: int, shape: Sequence[int]) -> Tensor:
    """Two rows, the same in every process."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "fingerprint"))
    return torch.rand(min(_ROWS, shape[0]), *shape[1:], generator=generator) * 2 - 1
