"""What a piece of work is called, and what crosses a cut for it.

    item      (batch, microbatch, session): the key of a piece of work, and of every message about it
    bundle    the tensors that cross a cut, described by one ``TensorSpec`` each; None where nothing is
    context   a second bundle that rides along undifferentiated: labels, masks, positions

A layer gives one tensor, a bundle of one, or a tuple of tensors. A gradient is a bundle like that of the activation,
None where a tensor is not differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = [
    "Bundle",
    "Item",
    "Specs",
    "TensorSpec",
    "as_bundle",
    "as_value",
    "detached",
    "differentiable",
    "gradients_like",
    "is_bundle",
    "is_differentiable",
    "present",
    "rows_in",
    "specs_of",
]

Bundle = tuple[Tensor | None, ...]
"""Tensors side by side; None: nothing in this place."""


class Item(NamedTuple):
    """The key of a piece of work: the batch's id, from 0; its part of the batch, in modes that cut batches; its part of
    the sequence, in runs that cut time.
    """

    batch: int
    microbatch: int = 0
    session: int = 0

    def __str__(self) -> str:
        return f"{self.batch}.{self.microbatch}" + (f".{self.session}" if self.session else "")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a bundle, of a whole batch: name in errors, shape [batch, ...], whether a gradient comes back."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool = False

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"

    def empty(self) -> Tensor:
        """A tensor like it without memory, on the device ``meta``."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


Specs = tuple[TensorSpec | None, ...]
"""What a bundle is described by; None where it has nothing."""


def specs_of(bundle: Bundle, name: str, *, differentiable: bool = False) -> Specs:
    """The specs of a bundle of a whole batch, called ``name``, with their number behind it where there are several.
    ``differentiable``: gradients come back for those that hold floating-point numbers.
    """
    names = [name] if len(bundle) == 1 else [f"{name} {place}" for place in range(len(bundle))]
    return tuple(
        t if t is None else TensorSpec(called, tuple(t.shape), t.dtype, differentiable and t.is_floating_point())
        for called, t in zip(names, bundle, strict=True)
    )


def as_bundle(value: Any) -> Bundle:
    """What a layer gave, as a bundle: of other containers than tuples the tensors, in order."""
    if isinstance(value, Tensor):
        return (value,)
    if is_bundle(value):
        return tuple(value)
    return tuple(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def is_bundle(value: Any) -> bool:
    """Whether it is a tensor, or a tuple or list of tensors and Nones."""
    if isinstance(value, Tensor):
        return True
    return type(value) in (tuple, list) and all(each is None or isinstance(each, Tensor) for each in value)


def as_value(bundle: Bundle) -> Any:
    """A bundle as a layer or a loss takes it: the tensor itself where it is alone, else the tuple."""
    return bundle[0] if len(bundle) == 1 and bundle[0] is not None else bundle


def present(tensor: Tensor | None) -> Tensor:
    """The tensor of a place that surely has one."""
    assert tensor is not None, "a place of a bundle that has a tensor"
    return tensor


def is_differentiable(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a gradient comes back for what lies in a place."""
    return tensor is not None and tensor.is_floating_point()


def differentiable(bundle: Bundle) -> list[Tensor]:
    """The tensors that gradients come back for."""
    return [tensor for tensor in bundle if is_differentiable(tensor)]


def detached(bundle: Bundle) -> Bundle:
    """The same tensors without their graph."""
    return tuple([None if tensor is None else tensor.detach() for tensor in bundle])


def rows_in(value: Any, rows: slice) -> Any:
    """The rows of a tensor, or of each in a tuple of them."""
    if isinstance(value, tuple):
        return tuple(None if tensor is None else tensor[rows] for tensor in value)
    return value[rows]


def gradients_like(found: Bundle, x: Bundle, samples: slice = slice(None)) -> Bundle:
    """The gradients ``found`` for ``x`` as they are sent: zeros where there is none, None for what is not
    differentiable; of these ``samples`` alone.
    """
    return tuple(
        (torch.zeros_like(tensor) if gradient is None else gradient)[samples] if is_differentiable(tensor) else None
        for gradient, tensor in zip(found, x, strict=True)
    )
