"""A tensor, or a layer's description, as a few numbers, so that two processes can compare what they have."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["Sketch", "differences", "sketch_of"]

_BLOCK = 1 << 18
_CLOSE, _CLOSE_COMPUTED = 1e-5, 1e-3  # what other threads and processors may round differently


@dataclass(frozen=True)
class Sketch:
    """Small enough to be sent."""

    kind: str  # shape and dtype; of a layer, what it prints as
    digest: str = ""  # of what has to be equal bit for bit; empty for floating point
    total: float = 0.0  # the sum of floating-point values, each times a fixed weight in [-1, 1]
    size: float = 0.0  # the sum of their absolute values
    computed: bool = False  # the values come out of layers or the loss, and so round more


def sketch_of(tensor: Tensor, computed: bool = False) -> Sketch:
    """The sketch of a tensor, at about 1 GB/s."""
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


def differences(expected: Mapping[str, Sketch], built: Mapping[str, Sketch]) -> Iterator[str]:
    """Where what a worker has built differs from what this process expects of it, one clause each.

    What layers and loss give is only told where all that they were given is the same.
    """
    told = False
    for name in dict.fromkeys([*expected, *built]):
        here, there = expected.get(name), built.get(name)
        if here is None or there is None or here.kind != there.kind:
            if ((here or there or Sketch("")).computed) and (told or here is None or there is None):
                continue
            mine, theirs = ("not there" if sketch is None else sketch.kind for sketch in (here, there))
            yield f"{name} is {mine} here, {theirs} in the worker"
        elif _alike(here, there) or (here.computed and told):
            continue
        elif here.kind.startswith("[] ") and not here.digest:
            yield f"{name} is {here.total:.6g} here, {there.total:.6g} in the worker"
        else:
            yield f"{name}: other values in the worker"
        told = True


def _alike(one: Sketch, other: Sketch) -> bool:
    within = (_CLOSE_COMPUTED if one.computed else _CLOSE) * max(one.size, other.size)
    pairs = ((one.total, other.total), (one.size, other.size))
    same = all(a == b or abs(a - b) <= within or (math.isnan(a) and math.isnan(b)) for a, b in pairs)
    return same and one.digest == other.digest


@cache
def _weights() -> Tensor:
    weights = 2 * torch.rand(_BLOCK, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    weights[0] = 1.0  # a single number is its own sketch
    return weights
