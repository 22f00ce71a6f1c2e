"""Proof, on batch 0 and before anything starts, that the layers in a row are the model, and the stages its parts.

the model's own forward  ==  layer 0 -> layer 1 -> ...    in evaluation mode: the output
                                                          in training mode: output, buffers and gradients
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pipeline.errors import PlanError
from pipeline.messages.bundle import as_bundle, as_value, detached, differentiable, rows_in
from pipeline.model.autograd_graph import leaves_of
from pipeline.model.given_model import copy_of, hooks_of, overrides
from pipeline.model.partition import Layer, layers_of
from pipeline.plan.plan import Ties
from pipeline.seeding import seeded
from pipeline.user_code import calling
from pipeline.wording import text_of

__all__ = ["Step", "check_borrowing", "check_chain", "close", "equal", "has_a_forward_of_its_own", "ties_of"]

_T = TypeVar("_T")
_Model = nn.Module | Sequence[nn.Module]
_ROWS = 4  # of the batch, for the proof in training mode; batch normalisation needs two


def check_chain(model: _Model, layers: Sequence[Layer], inputs: Any) -> list[Any]:
    """Prove that the layers in a row are the model, and return every layer's output for ``inputs`` (evaluation mode).

    Works on copies of the model and on ``inputs`` [batch, ...], in training mode on four rows; both sides draw the same
    random numbers. PlanError: a tensor outside every layer, a hook on the model itself, a layer without a forward
    or that gives neither a tensor nor a tuple of tensors, or a chain that computes something else than the model's own
    forward: its output, its buffers or its gradients, in evaluation or in training mode.
    """
    if isinstance(model, nn.Module):
        _nothing_lost(model, layers)
        _nothing_left_out(model)
    for layer in layers:
        if not overrides(layer.module, "forward"):
            raise PlanError(
                f"layer {layer.name} is a {type(layer.module).__name__}, which has no forward: move what it holds into "
                "the layers that compute with it."
            )
    outputs = _check_evaluation(model, inputs)
    _check_training(model, inputs)
    return outputs


def ties_of(stages: Sequence[Sequence[Layer]]) -> Ties | None:
    """The weights that several stages compute with.

    Raises:
        PlanError: two of them share memory and are not the same tensor, or a buffer; or some weights are shared by
            other stages than others.
    """
    found = sorted(_in_memory(stages))
    pairs = [
        sorted((place, other), key=attrgetter("order"))
        for at, place in enumerate(found)
        for other in found[at + 1 : bisect_left(found, place.end, key=attrgetter("start"))]
        if other.stage != place.stage
    ]
    if not pairs:
        return None
    for first, second in sorted(pairs, key=lambda pair: pair[1].order):
        if first.identity != second.identity or not first.learns:
            how = "are the same tensor" if first.identity == second.identity else "share their memory"
            raise PlanError(
                f"{first.name} (stage {first.stage}) and {second.name} (stage {second.stage}) {how}: tied "
                "weights cannot be split over stages; put both into one stage, or untie them."
            )
    groups: dict[int, list[_Place]] = {}
    for place in sorted((place for pair in pairs for place in pair), key=attrgetter("order")):
        groups.setdefault(place.start, []).append(place)
    having = {tuple(sorted({place.stage for place in group})) for group in groups.values()}
    if len(having) > 1:
        raise PlanError(
            f"stages {' and '.join(map(str, sorted(having)))} share weights: one set of stages can; cut elsewhere."
        )
    names = tuple(tuple(dict.fromkeys(place.name for place in group)) for group in groups.values())
    return Ties(having.pop(), names, sum(group[0].end - group[0].start for group in groups.values()))


class _Place(NamedTuple):
    """[start, end) of a tensor in memory, by which places are sorted; and what it is."""

    start: int
    end: int
    order: int
    stage: int
    name: str
    identity: int
    learns: bool


def _in_memory(stages: Sequence[Sequence[Layer]]) -> Iterator[_Place]:
    order = count()
    for index, layer in ((index, layer) for index, stage in enumerate(stages) for layer in stage):
        named = layer.module.named_parameters(remove_duplicate=False)
        for name, tensor in (*named, *layer.module.named_buffers(remove_duplicate=False)):
            start, size = id(tensor), 1  # what has no place of its own is compared by identity
            if tensor.layout is torch.strided and tensor.numel():
                steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
                start, size = tensor.data_ptr(), (steps + 1) * tensor.element_size()
            yield _Place(start, start + size, next(order), index, layer.full(name), id(tensor), tensor.requires_grad)


def _nothing_lost(model: nn.Module, layers: Sequence[Layer]) -> None:
    inside = {id(tensor) for layer in layers for tensor in (*layer.module.parameters(), *layer.module.buffers())}
    lost = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if id(tensor) not in inside]
    if lost:
        raise PlanError(f"{', '.join(lost)} belong to no layer and would be lost: move them into one of the layers.")


def _nothing_left_out(model: nn.Module) -> None:
    """The stages call the layers, never the model itself; a proof can neither see nor copy all that hangs on it."""
    kind, forward = type(model).__name__, vars(model).get("forward")
    if names := [getattr(hook, "__name__", type(hook).__name__) for hook in hooks_of(model)]:
        raise PlanError(
            f"{kind} has hooks on itself ({', '.join(names)}), and a pipeline calls its layers only: put them on a "
            "layer, or leave them out."
        )
    if forward is not None and getattr(forward, "__self__", None) is not model:
        raise PlanError(
            f"the forward of this one {kind} was replaced by a function, and a pipeline calls its layers only: write a "
            "class whose forward calls them in order."
        )


def _check_evaluation(model: _Model, inputs: Any) -> list[Any]:
    chain = layers_of(copy_of(model))
    for layer in chain:
        layer.module.eval()
    with torch.no_grad(), seeded(0, "proof"):
        outputs = _run_chain(chain, _copied(inputs))  # a layer may work in place
    if isinstance(model, nn.Module) and (has_a_forward_of_its_own(model) or overrides(model, "train", "eval")):
        whole = copy_of(model)
        whole.eval()  # one of the user's own need not give the model back
        _same_modes(whole, chain)
        if has_a_forward_of_its_own(model):
            with torch.no_grad(), seeded(0, "proof"), calling(f"{type(model).__name__}.forward"):
                expected = whole(*as_bundle(_copied(inputs)))
            if not equal(expected, outputs[-1]):
                raise PlanError(
                    f"{type(model).__name__}.forward does not compute the chain of its children "
                    f"({_names(chain)}): put everything its forward does into layers, in order."
                )
    return outputs


def _copied(inputs: Any) -> Any:
    return as_value(tuple(each if each is None else each.clone() for each in as_bundle(inputs)))


def _run_chain(layers: Sequence[Layer], value: Any) -> list[Any]:
    outputs = []
    for layer in layers:
        given = ", ".join("None" if each is None else f"{list(each.shape)} {each.dtype}" for each in as_bundle(value))
        try:
            value = layer.module(value)
        except Exception as error:
            what = "what the layer before it gives" if layer.index else "the inputs"
            raise PlanError(f"layer {layer.name} cannot take {what}, {given}: {text_of(error)}") from error
        places = value if isinstance(value, tuple) else (value,)
        last = layer is layers[-1] and as_bundle(value)
        if not last and (
            not all(isinstance(each, Tensor | None) for each in places) or all(each is None for each in places)
        ):
            raise _wrong(layer, value, "a tensor, or a tuple of tensors; merge it with the next")
        outputs.append(value)
    return outputs


def _wrong(layer: Layer, value: object, wanted: str) -> PlanError:
    kinds = f" of {', '.join(type(each).__name__ for each in value)}" if isinstance(value, tuple) else ""
    return PlanError(f"layer {layer.name} gives a {type(value).__name__}{kinds}: a layer gives {wanted}.")


def _same_modes(whole: nn.Module, chain: Sequence[Layer]) -> None:
    """The model's own ``eval()`` may leave a dropout on; the stages only have what its layers do by themselves."""
    apart = [
        ".".join(filter(None, (layer.name, name)))
        for theirs, layer in zip(layers_of(whole), chain, strict=True)
        for (name, module), other in zip(layer.module.named_modules(), theirs.module.modules(), strict=True)
        if module.training is not other.training
    ]
    if apart:
        raise PlanError(
            f"{type(whole).__name__}.eval() leaves {', '.join(apart)} in training mode, and a pipeline evaluates every "
            "layer as its own eval() leaves it: give the layer a train() of its own."
        )


def _check_training(model: _Model, inputs: Any) -> None:
    _on_few_rows(lambda rows: check_borrowing(layers_of(copy_of(model)), rows), inputs)
    if not (isinstance(model, nn.Module) and has_a_forward_of_its_own(model)):
        return
    own = f"{type(model).__name__}.forward in training mode"
    with calling(own):
        rows, theirs = _on_few_rows(lambda rows: Step.of(model, lambda whole, x: whole(*as_bundle(x)), rows), inputs)
    mine = Step.of(model, lambda whole, x: _run_chain(layers_of(whole), x)[-1], rows)
    if not equal(theirs.output, mine.output):
        raise PlanError(
            f"{own} does not compute the chain of its children ({_names(layers_of(model))}), though in evaluation mode "
            "it does: make what it does in training only, such as dropout or noise, a layer (nn.Dropout), in order."
        )
    if apart := [name for name, buffer in theirs.buffers.items() if not equal(buffer, mine.buffers[name])]:
        raise PlanError(
            f"{own} does not leave the values in {', '.join(apart)} that the chain of its children leaves: let no "
            "forward but that of the layer itself set them."
        )
    if apart := [name for name, gradient in theirs.gradients.items() if not close(gradient, mine.gradients[name])]:
        raise PlanError(
            f"{own} does not give {', '.join(apart)} the gradients that the chain of its children gives: put what it "
            "does to them between its children, such as detach() or no_grad(), into layers; freeze what is not to "
            "learn by requires_grad_(False)."
        )


def _on_few_rows(run: Callable[[Any], _T], inputs: Any) -> tuple[Any, _T]:
    """The first rows and what ``run`` gives for them; all of them where it takes nothing but whole batches."""
    try:
        return rows_in(inputs, slice(_ROWS)), run(rows_in(inputs, slice(_ROWS)))
    except Exception:
        return inputs, run(inputs)


def check_borrowing(layers: Sequence[Layer], value: Any) -> None:
    """Refuse layers that learn parameters of another one: reached by a list or a closure, they are not seen as tied."""
    names = {id(p): layer.full(name) for layer in layers for name, p in layer.module.named_parameters()}
    borrowed = []
    for layer in layers:
        with torch.enable_grad(), seeded(0, "proof"):
            given = tuple(each if each is None else each.clone() for each in detached(as_bundle(value)))
            (value,) = _run_chain([layer], as_value(given))
        found = {id(leaf) for tensor in differentiable(as_bundle(value)) for leaf in leaves_of(tensor)}
        others = found - {id(own) for own in layer.module.parameters()}
        borrowed += [f"layer {layer.name} computes with {names[leaf]}" for leaf in others if leaf in names]
    if borrowed:
        raise PlanError(
            f"{'; '.join(borrowed)}, which it does not hold: a layer computes with parameters of its own; put both "
            "layers into one module, or give this one the parameter as an attribute."
        )


class Step(NamedTuple):
    """What a forward and a backward pass in training mode leave: the output, buffers and gradients by name."""

    output: object
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    @classmethod
    def of(cls, model: nn.Module, run: Callable[[nn.Module, Any], object], x: Any) -> Step:
        """Run a copy of the model."""
        model = copy_of(model)
        with torch.enable_grad(), seeded(0, "proof"):
            output = run(model, tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, x))
        found = [each for each in as_bundle(output) if each is not None and each.requires_grad]
        if found:
            with seeded(0, "gradient"):  # a sum would hide what a softmax or a normalisation cancels
                torch.autograd.backward(found, [torch.randn_like(each) for each in found])
        return cls(output, dict(model.named_buffers()), {name: p.grad for name, p in model.named_parameters()})


def has_a_forward_of_its_own(model: nn.Module) -> bool:
    """Whether it may compute something else than its children in a row; an nn.ModuleList has no forward at all."""
    own = type(model).forward not in (nn.Sequential.forward, nn.ModuleList.forward)
    return own or "forward" in vars(model) or overrides(model, "__call__")


def equal(theirs: object, mine: object) -> bool:
    """To the last bit; what is no tensor is the same object."""
    if not (isinstance(theirs, Tensor) and isinstance(mine, Tensor)):
        return theirs is mine
    return theirs.dtype == mine.dtype and torch.equal(theirs, mine)


def close(theirs: Tensor | None, mine: Tensor | None) -> bool:
    """Of gradients: but for the rounding of sums in another order."""
    if theirs is None or mine is None:
        return theirs is mine
    return not bool((theirs - mine).norm() > 1e-3 * theirs.norm())


def _names(layers: Sequence[Layer]) -> str:
    return ", ".join(layer.name for layer in layers)
