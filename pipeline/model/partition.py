"""From a model to stages: a chain of named layers, cut into consecutive groups.

model  ->  layers (name, module) in order  ->  sizes, e.g. (1, 3, 2, 2)  ->  one list of layers per stage
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from pipeline.errors import PlanError, nearest
from pipeline.model.given_model import hooks_of, overrides
from pipeline.plan.plan import Plan

__all__ = [
    "Layer",
    "balanced_sizes",
    "balanced_split",
    "chosen_sizes",
    "depth_of",
    "ends_normalised",
    "evaluated_in_training",
    "layers_of",
    "places_of_cuts",
    "split",
]

_NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_SIZE_IS_KEPT = {f"torch.nn.modules.{name}" for name in ("activation", "dropout", "flatten", "linear")}
"""Where torch keeps activation functions, dropout, Flatten and Identity; what has weights there is no such."""


@dataclass(frozen=True)
class Layer:
    """One link of the chain, from one bundle to the next; its name, e.g. ``blocks.2``, is the prefix of its parameters
    in the unsplit model. A ``part`` of a model's own forward (``pipeline.model.segment``) has them under whole names.
    """

    index: int
    name: str
    module: nn.Module
    part: bool = False

    def full(self, name: str) -> str:
        """The name in the unsplit model of a parameter or buffer of ``module``."""
        return name if self.part else f"{self.name}.{name}"


def layers_of(model: nn.Module | Sequence[nn.Module]) -> list[Layer]:
    """The chain of layers of a model.

    An ``nn.Sequential``, an ``nn.ModuleList`` or a list of modules gives its items, any other module its children in
    the order of their registration, with Sequential children opened; ``pipeline.model.proof`` compares its forward.

    What lies deeper is opened to any depth: every ModuleList, and every Sequential with two layers or more that have a
    weight matrix or kernel. One with a single such layer, as Linear, BatchNorm, ReLU, stays together. A container with
    a hook, a forward, a ``train()`` or a parameter of its own is a layer like any other: opened, it would never run.
    """
    children = _children(model) if isinstance(model, nn.Module) else [(str(i), m) for i, m in enumerate(model)]
    pairs = isinstance(model, nn.Module) and not isinstance(model, nn.Sequential | nn.ModuleList)
    named = [item for name, child in children for item in _opened(name, child, pairs=pairs)]
    if not named:
        wanted = "an nn.Sequential, a list of modules, or a chain of children"
        raise PlanError(f"the model has no layers to split: give {wanted}.")
    return [Layer(index, name, module) for index, (name, module) in enumerate(named)]


def depth_of(layers: Sequence[Layer]) -> int:
    """How many weight matrices or kernels ``layers`` learn: parameters that extend in two dimensions or more.

    Normalisations and what scales whole units or channels have none. Tables (embeddings, positions) count.
    """
    weights = (weight for layer in layers for weight in _weights(layer.module))
    return sum(weight.requires_grad and sum(size > 1 for size in weight.shape) > 1 for weight in weights)


def _weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Its parameters, without those of normalisations."""
    for inner in module.modules():
        if not isinstance(inner, _NORMALISATIONS):
            yield from inner.parameters(recurse=False)


def ends_normalised(layers: Sequence[Layer]) -> bool:
    """Whether what comes out of ``layers`` is normalised by a layer of torch, behind which come at most activation
    functions, dropout and changes of shape.
    """
    for module in _from_the_end([layer.module for layer in layers]):
        if isinstance(module, _NORMALISATIONS):
            return True
        if type(module).__module__ not in _SIZE_IS_KEPT or not _without_parameters(module):
            return False
    return False


def _from_the_end(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for module in reversed(modules):
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _from_the_end(list(module))
        else:
            yield module


def chosen_sizes(layers: Sequence[Layer], plan: Plan) -> tuple[int, ...] | None:
    """The layers per stage that the plan fixes by ``sizes``, ``cuts`` or a balance by number; None: measure first."""
    if plan.stages > len(layers):
        asked = f"{plan.stages} stages for {len(layers)} layers"
        raise PlanError(f"{asked}: every stage needs a layer; use --stages {len(layers)} or fewer.")
    if plan.sizes is not None and sum(plan.sizes) != len(layers):
        raise PlanError(
            f"sizes {' '.join(map(str, plan.sizes))} add up to {sum(plan.sizes)}, but the model has {len(layers)} "
            f"layers: {', '.join(layer.name for layer in layers)}."
        )
    if plan.cuts is not None:
        return _sizes_from_cuts(layers, plan.cuts)
    if plan.sizes is None and plan.balance == "layers":
        return balanced_split(layers, [1.0] * len(layers), plan.stages)
    return plan.sizes


def balanced_split(layers: Sequence[Layer], costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """``balanced_sizes`` without a cut before a layer that has no parameters: between a Linear and its ReLU a DNI would
    learn from what the ReLU is going to cut off. Where fewer layers than stages have some, any layer may begin a stage.
    """
    free = [index for index in range(1, len(layers)) if not _without_parameters(layers[index].module)]
    if free and all(_without_parameters(layer.module) for layer in layers[: free[0]]):
        del free[0]  # those in front have no layer before them: they stay with the first that learns
    starts = [0, *free] if len(free) >= stages - 1 else list(range(len(layers)))
    edges = [*starts, len(layers)]
    grouped = balanced_sizes([sum(costs[a:b]) for a, b in pairwise(edges)], stages)
    return tuple(edges[end] - edges[end - size] for size, end in zip(grouped, accumulate(grouped), strict=True))


def _without_parameters(module: nn.Module) -> bool:
    """As activation functions, dropout, pooling and Flatten are."""
    return not any(True for _ in module.parameters())


def balanced_sizes(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """The consecutive split into ``stages`` non-empty groups whose most expensive group is cheapest.

    Exact, by dynamic programming over prefixes: best[k][n] = min over m of max(best[k-1][m], cost of layers m to n).
    Among equals the earlier cut wins.
    """
    num_layers = len(costs)
    prefix = [0.0, *accumulate(costs)]
    best, cuts = prefix, []
    for k in range(2, stages + 1):
        row, choice = [float("inf")] * (num_layers + 1), [0] * (num_layers + 1)
        for n in range(k, num_layers + 1):
            row[n], choice[n] = min((max(best[m], prefix[n] - prefix[m]), m) for m in range(k - 1, n))
        best = row
        cuts.append(choice)
    ends = [num_layers]
    for choice in reversed(cuts):
        ends.append(choice[ends[-1]])
    return tuple(b - a for a, b in pairwise([0, *reversed(ends)]))


def split(layers: Sequence[Layer], sizes: Sequence[int]) -> list[list[Layer]]:
    """The layers of each stage."""
    ends = list(accumulate(sizes))
    return [list(layers[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def places_of_cuts(stages: Sequence[Sequence[Layer]]) -> str:
    """What is said of stages that begin with a layer without parameters, which had better stay below the cut."""
    begin = [layer for layer, *_ in stages[1:] if _without_parameters(layer.module)]
    first = [f"{layer.name} ({type(layer.module).__name__})" for layer in begin]
    if not first:
        return ""
    return f"; the cut is better behind {', '.join(first)}, without parameters: a DNI should see what comes out there"


def evaluated_in_training(layers: Sequence[Layer]) -> Iterator[tuple[str, str, str]]:
    """What is said of modules that are in evaluation mode while the rest trains."""
    modules = [(f"{layer.name}.{name}".strip("."), m) for layer in layers for name, m in layer.module.named_modules()]
    if names := [name for name, module in modules if not module.training]:
        which = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        why = f"as model() and its train() leave them, in training too: {which}"
        yield "eval mode", f"{len(names)} of {len(modules)} modules", why


def _sizes_from_cuts(layers: Sequence[Layer], cuts: Sequence[str]) -> tuple[int, ...]:
    names = [layer.name for layer in layers]
    firsts = {cut: next((i for i, name in enumerate(names) if f"{name}.".startswith(f"{cut}.")), None) for cut in cuts}
    for cut, first in firsts.items():
        if first is None:
            raise PlanError(nearest(cut, names, "layer in cuts"))
    starts = [0, *(firsts[cut] or 0 for cut in cuts), len(names)]
    sizes = tuple(b - a for a, b in pairwise(starts))
    if min(sizes) < 1:
        raise PlanError(f"cuts {' '.join(cuts)} leave a stage without layers: name layers in order, not the first one.")
    return sizes


def _opened(name: str, child: nn.Module, *, pairs: bool = False) -> list[tuple[str, nn.Module]]:
    """What stands for a child in the chain. ``pairs``: open it even if at most one layer in it has a weight matrix."""
    if not (_is_open(child) or (isinstance(child, nn.ModuleList) and not overrides(child, "forward"))):
        return [(name, child)]
    inside = _children(child)
    weigh = sum(any(weight.dim() > 1 for weight in _weights(module)) for _, module in inside)
    if isinstance(child, nn.Sequential) and weigh < 2 and not pairs:
        return [(name, child)]
    return [item for inner, module in inside for item in _opened(f"{name}.{inner}", module)]


def _is_open(child: nn.Module) -> bool:
    """Whether calling an nn.Sequential is nothing but calling its items."""
    return (
        isinstance(child, nn.Sequential)
        and type(child).forward is nn.Sequential.forward
        and "forward" not in vars(child)
        and not overrides(child, "__call__", "train", "eval")
        and not hooks_of(child)
        and not any(True for _ in (*child.parameters(recurse=False), *child.buffers(recurse=False)))
        and not parametrize.is_parametrized(child)
    )


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All children in order. ``named_children`` leaves out the second place of one that stands in two (an nn.ReLU)."""
    named = module.named_modules(remove_duplicate=False)
    return [(name, child) for name, child in named if name and "." not in name]
