"""Calls of layers and losses that may write in place into the tensors they are given, which are not theirs to write in.

    x --copy--> layers     the first call, with gradients and without: did the copy's version move on?
    x --------> layers     every later one, unless it did

The inputs of a batch belong to the user's data set, and those of a stage are a leaf, which autograd keeps from writing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Unwritten"]

_Result = TypeVar("_Result")


class Unwritten(Generic[_Result]):
    """A function whose tensor arguments keep their values. ``writes``: whether it writes into them; if None, it gets
    copies the first time, and from then on only if it wrote into one, or gave back a view of one.
    """

    def __init__(self, function: Callable[..., _Result], writes: bool | None = None) -> None:
        self._function = function
        self._needs_copies: dict[bool, bool] = {} if writes is None else {False: writes, True: writes}

    def __call__(self, *given: object) -> _Result:
        needed = self._needs_copies.get(torch.is_grad_enabled())
        if needed is False:
            return self._function(*given)
        arguments = [_copy(each) if isinstance(each, Tensor) else each for each in given]
        copies = [each for each in arguments if isinstance(each, Tensor)]
        versions = [copy._version for copy in copies]
        result = self._function(*arguments)
        if needed is None:
            written = versions != [copy._version for copy in copies]
            self._needs_copies[torch.is_grad_enabled()] = written or _lies_in(result, copies)
        return result


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides: kernels round by them. ``clone`` closes the gaps of a slice."""
    if tensor.is_contiguous() or 0 in tensor.stride():
        return tensor.clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _lies_in(result: object, tensors: list[Tensor]) -> bool:
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    results = result if isinstance(result, list | tuple) else [result]
    return any(each.untyped_storage().data_ptr() in given for each in results if isinstance(each, Tensor))
