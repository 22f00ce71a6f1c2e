"""What a stage keeps of the pieces of work between their forward and their last use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.errors import StageError
from pipeline.messages.bundle import Bundle, Item, as_value, detached
from pipeline.stage.gradient_flow import Route
from pipeline.stage.layers import Stash

__all__ = ["InFlight", "Kept"]


@dataclass(slots=True)
class Kept:
    """What is kept of one piece of work."""

    route: Route
    x: Bundle  # the input the graph hangs on, or of the input what the stage below wants a gradient for
    h: Bundle  # the output, with its graph until the backward pass is over
    context: Bundle
    samples: slice  # of the gradient of x, what the stage below wants
    leaves: list[Tensor]  # what the gradients are taken for: the parameters, or their stashed copies
    stash: Stash  # parameters and buffers of the forward pass, if not today's
    natural: dict[int, Tensor] = field(default_factory=dict)  # gradients of x by place, with autograd's strides
    synthetic: Tensor | None = None  # what the DNI predicted
    loss: float = float("nan")  # in the last stage

    @property
    def labels(self) -> Any:
        return as_value(self.context)


class InFlight(dict[Item, Kept]):
    """The pieces of work of one stage that something is still kept of."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self._stage = stage

    def of(self, item: Item) -> Kept:
        """What is kept of a piece of work.

        Raises:
            StageError: nothing is, or no longer.
        """
        if item not in self:
            raise self.out_of_place(item.batch, f"something for microbatch {item.microbatch}")
        return self[item]

    def updated(self, item: Item) -> None:
        """Keep of a batch after its update only what its target needs: h and the labels, the graph too, or nothing."""
        kept = self[item]
        if not kept.route.wants_target:
            del self[item]
        elif not kept.route.relays:
            kept.h, kept.x, kept.leaves, kept.synthetic, kept.stash = detached(kept.h), (), [], None, {}

    def relaying(self) -> list[int]:
        """The batches whose true gradient is still to be taken through the stage."""
        return [item.batch for item, kept in self.items() if kept.route.relays]

    def forget(self, before: int) -> None:
        """Keep nothing of batches older than ``before``: the targets that have not come yet were dropped."""
        for item in [item for item in self if item.batch < before]:
            del self[item]

    def out_of_place(self, batch: int, what: str) -> StageError:
        """The error to raise for something that came for a batch of which nothing is kept."""
        what = f"{what} came, of which nothing is kept: it came twice, or too late"
        return StageError(what, stage=self._stage, batch=batch)
