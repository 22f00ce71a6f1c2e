"""From a model to stages: a chain of named layers, cut into consecutive groups.

model  ->  layers (name, module) in order  ->  sizes, e.g. (1, 3, 2, 2)  ->  one list of layers per stage
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.errors import PlanError, nearest
from pipeline.plan.plan import Plan
from pipeline.wording import text_of

__all__ = [
    "Layer",
    "balanced_sizes",
    "check_partition",
    "chosen_sizes",
    "depth_of",
    "ends_normalised",
    "layers_of",
    "split",
]

_NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_SIZE_IS_KEPT = {f"torch.nn.modules.{name}" for name in ("activation", "dropout", "flatten", "linear")}
"""Where torch keeps activation functions, dropout, Flatten and Identity; what has weights there is no such."""


@dataclass(frozen=True)
class Layer:
    """One link of the chain.

    Attributes:
        index: position in the whole network.
        name: prefix of its parameters in the unsplit model, e.g. ``blocks.2``.
        module: what runs; takes one tensor, gives one tensor.
    """

    index: int
    name: str
    module: nn.Module


def layers_of(model: nn.Module | Sequence[nn.Module]) -> list[Layer]:
    """The chain of layers of a model.

    An ``nn.Sequential``, an ``nn.ModuleList`` or a list of modules gives its items. Any other module gives its children
    in the order of their registration, with ModuleList and Sequential children opened one level; ``check_partition``
    then proves on a batch that this chain computes what the module's own forward computes.

    Raises:
        PlanError: no layer at all.
    """
    if isinstance(model, nn.Sequential | nn.ModuleList):
        named = _children(model)
    elif isinstance(model, nn.Module):
        named = [item for name, child in _children(model) for item in _opened(name, child)]
    else:
        named = [(str(index), module) for index, module in enumerate(model)]
    if not named:
        raise PlanError(
            "the model has no layers to split: give an nn.Sequential, a list of modules, or a chain of children."
        )
    return [Layer(index, name, module) for index, (name, module) in enumerate(named)]


def depth_of(layers: Sequence[Layer]) -> int:
    """How many weight matrices or kernels ``layers`` learn: parameters that extend in two dimensions or more.

    A normalisation has none, nor is what scales whole units or channels one. Tables (embeddings, positions) count.
    """
    return sum(
        parameter.requires_grad and sum(size > 1 for size in parameter.shape) > 1
        for layer in layers
        for module in layer.module.modules()
        if not isinstance(module, _NORMALISATIONS)
        for parameter in module.parameters(recurse=False)
    )


def ends_normalised(layers: Sequence[Layer]) -> bool:
    """Whether what comes out of ``layers`` is normalised: nothing with weights comes behind a layer of torch that does.

    Activation functions, dropout and changes of shape may; what is pooled is not of one size any more. What a module of
    the user's ends in is not known, and it counts as not normalised.
    """
    for module in _from_the_end([layer.module for layer in layers]):
        if isinstance(module, _NORMALISATIONS):
            return True
        if type(module).__module__ not in _SIZE_IS_KEPT or any(True for _ in module.parameters()):
            return False
    return False


def _from_the_end(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Last one first, what is inside of an ``nn.Sequential`` instead of it."""
    for module in reversed(modules):
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _from_the_end(list(module))
        else:
            yield module


def chosen_sizes(layers: Sequence[Layer], plan: Plan) -> tuple[int, ...] | None:
    """The layers per stage that the plan fixes by ``sizes``, ``cuts`` or a balance by number; None: measure first.

    Raises:
        PlanError: more stages than layers, sizes that do not add up, an unknown or misplaced cut.
    """
    if plan.stages > len(layers):
        raise PlanError(
            f"{plan.stages} stages for {len(layers)} layers: every stage needs a layer; "
            f"use --stages {len(layers)} or fewer."
        )
    if plan.sizes is not None:
        if sum(plan.sizes) != len(layers):
            raise PlanError(
                f"sizes {' '.join(map(str, plan.sizes))} add up to {sum(plan.sizes)}, but the model has {len(layers)} "
                f"layers: {', '.join(layer.name for layer in layers)}."
            )
        return plan.sizes
    if plan.cuts is not None:
        return _sizes_from_cuts(layers, plan.cuts)
    if plan.balance == "layers":
        return balanced_sizes([1.0] * len(layers), plan.stages)
    return None


def balanced_sizes(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """The consecutive split into ``stages`` non-empty groups whose most expensive group is cheapest.

    Exact, by dynamic programming over prefixes: best[k][n] = min over m of max(best[k-1][m], cost of layers m to n).
    Among equals the earlier cut wins.
    """
    num_layers = len(costs)
    prefix = [0.0, *accumulate(costs)]
    best = [prefix[n] for n in range(num_layers + 1)]
    cuts: list[list[int]] = []
    for k in range(2, stages + 1):
        row, choice = [float("inf")] * (num_layers + 1), [0] * (num_layers + 1)
        for n in range(k, num_layers + 1):
            row[n], choice[n] = min((max(best[m], prefix[n] - prefix[m]), m) for m in range(k - 1, n))
        best = row
        cuts.append(choice)
    ends = [num_layers]
    for choice in reversed(cuts):
        ends.append(choice[ends[-1]])
    ends.append(0)
    ends.reverse()
    return tuple(b - a for a, b in pairwise(ends))


def split(layers: Sequence[Layer], sizes: Sequence[int]) -> list[list[Layer]]:
    """The layers of each stage."""
    ends = list(accumulate(sizes))
    return [list(layers[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def check_partition(
    model: nn.Module | Sequence[nn.Module], layers: Sequence[Layer], stages: Sequence[Sequence[Layer]], inputs: Tensor
) -> list[Tensor]:
    """Prove that the stages are the model, and return every layer's output for ``inputs`` (evaluation mode).

    Args:
        model: the whole model.
        layers: its chain.
        stages: the chain, cut.
        inputs: [batch, ...], one batch.

    Raises:
        PlanError: a parameter that two stages share (tied weights), a parameter or buffer outside every layer, a layer
            that does not give one tensor, or a chain that computes something else than the model's own forward.
    """
    _no_ties(stages)
    if isinstance(model, nn.Module):
        _nothing_lost(model, layers)
    outputs = _run_chain(layers, inputs)
    if isinstance(model, nn.Module) and _has_a_forward_of_its_own(model):
        whole = copy.deepcopy(model).eval()
        with torch.no_grad():
            expected = whole(inputs.clone())
        if not (isinstance(expected, Tensor) and torch.equal(expected, outputs[-1])):
            raise PlanError(
                f"{type(model).__name__}.forward does not compute the chain of its children "
                f"({', '.join(layer.name for layer in layers)}): put everything its forward does into layers, in order."
            )
    return outputs


def _has_a_forward_of_its_own(model: nn.Module) -> bool:
    """Whether it may compute something else than its children in a row; an nn.ModuleList has no forward at all."""
    return type(model).forward not in (nn.Sequential.forward, nn.ModuleList.forward)


def _run_chain(layers: Sequence[Layer], inputs: Tensor) -> list[Tensor]:
    outputs, value = [], inputs.clone()  # a layer may work in place
    for layer in layers:
        module = copy.deepcopy(layer.module).eval()
        try:
            with torch.no_grad():
                value = module(value)
        except Exception as error:
            raise PlanError(
                f"layer {layer.name} cannot take what the layer before it gives, {list(value.shape)} {value.dtype}: "
                f"{text_of(error)}"
            ) from error
        if not isinstance(value, Tensor):
            raise PlanError(
                f"layer {layer.name} gives a {type(value).__name__}: a layer gives one tensor; merge it with the next."
            )
        outputs.append(value)
    return outputs


def _no_ties(stages: Sequence[Sequence[Layer]]) -> None:
    seen: dict[int, tuple[int, str]] = {}
    for index, stage in enumerate(stages):
        for layer in stage:
            tensors = (*layer.module.named_parameters(remove_duplicate=False), *layer.module.named_buffers())
            for name, tensor in tensors:
                full = f"{layer.name}.{name}"
                owner, first = seen.setdefault(id(tensor), (index, full))
                if owner != index:
                    raise PlanError(
                        f"{first} (stage {owner}) and {full} (stage {index}) are the same tensor: tied weights cannot "
                        "be split over stages; put both into one stage, or untie them."
                    )


def _nothing_lost(model: nn.Module, layers: Sequence[Layer]) -> None:
    inside = {id(tensor) for layer in layers for tensor in (*layer.module.parameters(), *layer.module.buffers())}
    lost = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if id(tensor) not in inside]
    if lost:
        raise PlanError(f"{', '.join(lost)} belong to no layer and would be lost: move them into one of the layers.")


def _sizes_from_cuts(layers: Sequence[Layer], cuts: Sequence[str]) -> tuple[int, ...]:
    names = [layer.name for layer in layers]
    for cut in cuts:
        if cut not in names:
            raise PlanError(nearest(cut, names, "layer in cuts"))
    starts = [0, *(names.index(cut) for cut in cuts), len(names)]
    sizes = tuple(b - a for a, b in pairwise(starts))
    if min(sizes) < 1:
        raise PlanError(f"cuts {' '.join(cuts)} leave a stage without layers: name layers in order, not the first one.")
    return sizes


def _opened(name: str, child: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(child, nn.ModuleList | nn.Sequential):
        return [(f"{name}.{inner}", module) for inner, module in _children(child)]
    return [(name, child)]


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All children in order. ``named_children`` leaves out the second place of one that stands in two (an nn.ReLU)."""
    named = module.named_modules(remove_duplicate=False)
    return [(name, child) for name, child in named if name and "." not in name]
