"""What a stage begins with, as a few numbers per tensor, so that two processes can compare what they have built.

recipe --> layers, weights, first batches, what layers and loss give for a fixed input --> name: Sketch

Every process makes the recipe for itself. Values that the program has set since, random numbers that the seed does not
give, or other data make another model of it, which trains without an error.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.data.batch import Minibatch, tensors_of_value
from pipeline.data.recipe import Recipe
from pipeline.messages.bundle import as_value, present, rows_in
from pipeline.model.given_model import copy_of
from pipeline.model.partition import Layer
from pipeline.run.resolved import Resolved
from pipeline.run.sketch import Sketch, sketch_of
from pipeline.seeding import derived_seed, seeded

__all__ = ["fingerprint", "first_two"]

_ROWS = 2
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(
    recipe: Recipe, resolved: Resolved, index: int, layers: Sequence[Layer], replica: int = 0
) -> dict[str, Sketch]:
    """Sketches of stage ``index``, whose layers are freshly built, before training. The layers stay as they are."""
    seed = resolved.plan.seed
    found: dict[str, Sketch] = {}
    for layer in layers:
        found[f"layer {layer.name}"] = Sketch(" ".join(_ADDRESS.sub("", repr(layer.module)).split()))
        tensors = (*layer.module.named_parameters(), *layer.module.named_buffers())
        found |= {f"{layer.name}.{name}": sketch_of(tensor) for name, tensor in tensors}
    if index == 0:
        first = recipe.seeded_batch(seed, 0)
        found |= _batch("batch 0", first)
        if replica == 0:  # the only one that looks at these
            found |= _batch("held-out batch 0", next(recipe.held_out(), ()))
        given = rows_in(tensors_of_value(first.inputs), slice(_ROWS))
        rows = as_value(tuple(present(each).clone() for each in given))
    else:
        activation = resolved.cuts[index - 1].activation
        rows = _fixed(seed, activation.shape).to(activation.dtype)
    # What takes no two rows is left out, in every process alike.
    with contextlib.suppress(Exception), seeded(seed, "fingerprint"), torch.no_grad():
        for layer in () if layers[0].part else layers:
            rows = copy_of(layer.module)(rows)
            found[f"what layer {layer.name} gives"] = sketch_of(rows, computed=True)
    if index == resolved.plan.stages - 1:
        with contextlib.suppress(Exception), seeded(seed, "fingerprint"), torch.no_grad():
            loss = recipe.loss(_fixed(seed, resolved.output_shape).abs(), load(resolved.two_labels)["labels"])
            found["the loss of a fixed output"] = sketch_of(loss, computed=True)
    return found


def first_two(labels: Tensor) -> bytes:
    """The labels of two rows, as bytes; none where that cannot be."""
    with contextlib.suppress(Exception):
        return save({"labels": labels[:_ROWS].detach().clone(memory_format=torch.contiguous_format)})
    return b""


def _batch(name: str, batch: Minibatch | tuple[()]) -> dict[str, Sketch]:
    return {
        f"{part} {place} of {name}" if place else f"{part} of {name}": sketch_of(present(tensor))
        for part, value in zip(("inputs", "labels"), batch, strict=False)
        for place, tensor in enumerate(tensors_of_value(value))
    }


def _fixed(seed: int, shape: Sequence[int]) -> Tensor:
    """Two rows, the same in every process."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "fingerprint"))
    return torch.rand(min(_ROWS, shape[0]), *shape[1:], generator=generator) * 2 - 1
