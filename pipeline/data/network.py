"""The network of a recipe, as layers in a row: a chain, where that is proved, else parts of its own forward."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from pipeline.data.batch import tensors_of_value
from pipeline.data.recipe import Recipe, build_model
from pipeline.errors import PlanError
from pipeline.messages.bundle import as_value
from pipeline.model.partition import Layer, layers_of, split
from pipeline.model.proof import check_chain, has_a_forward_of_its_own
from pipeline.model.proof_of_parts import check_parts
from pipeline.model.segment import parts_of, trace
from pipeline.plan.plan import Plan
from pipeline.user_code import RecipeFailed

__all__ = ["arguments", "layers_for", "stage_layers", "tried"]


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with the inputs of a batch: (args, kwargs)."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def tried(model: nn.Module, inputs: Any, plan: Plan) -> tuple[list[Layer], list[Any], Literal["chain", "forward"], str]:
    """The layers of a model and what each gives for ``inputs`` (evaluation mode); how they were found, and why so.

    Raises:
        PlanError: neither way works; says what keeps the children from being a chain, and what the forward from being
            followed.
    """
    why = "the inputs have names" if isinstance(inputs, dict) else ""
    if plan.split == "chain" and why:
        raise PlanError("split is chain, whose layers take inputs by place, and a batch is a dict: leave split out.")
    if plan.split != "forward" and not why:
        try:
            layers = layers_of(model)
            value = as_value(tensors_of_value(inputs))
            return layers, check_chain(model, layers, value), "chain", "the layers in a row are the model, proved"
        except RecipeFailed:
            raise
        except PlanError as error:
            if plan.split == "chain" or not (isinstance(model, nn.Module) and has_a_forward_of_its_own(model)):
                raise
            why = error.problems[0].partition(":")[0]
    if not (isinstance(model, nn.Module) and has_a_forward_of_its_own(model)):
        raise PlanError("a list of layers takes its inputs by place: give a tensor or a tuple of them, no dict.")
    args, kwargs = arguments(inputs)
    try:
        known = trace(model, args, kwargs)
        return parts_of(model, known), check_parts(model, known, args, kwargs), "forward", why or "the plan says so"
    except RecipeFailed:
        raise
    except PlanError as error:
        raise PlanError(*(f"{problem} (And it is no chain: {why}.)" for problem in error.problems)) from error


def layers_for(recipe: Recipe, plan: Plan) -> list[Layer]:
    """All layers, freshly initialised from the seed; the plan is resolved."""
    model = build_model(recipe, plan.seed)
    if plan.split != "forward":
        return layers_of(model)
    args, kwargs = arguments(recipe.seeded_batch(plan.seed, 0).inputs)
    return parts_of(model, trace(model, args, kwargs))


def stage_layers(recipe: Recipe, plan: Plan, index: int) -> list[Layer]:
    """The layers of one stage, freshly initialised from the seed. Parts of a forward keep the whole model."""
    assert plan.sizes is not None, "the plan is resolved"
    return split(layers_for(recipe, plan), plan.sizes)[index]
