"""Held-out batches through a rival's pipeline: forward only, every virtual stage on the rank that trains it.

    rank 0   S0b0 S0b1 S0b2             S3b0 S3b1 S3b2      S = virtual stage, b = batch; placed as a V
    rank 1        S1b0 S1b1 S1b2 S2b0 S2b1 S2b2             sending never blocks, so ranks overlap

torch's own schedules take batches of one size only, and ZBVZeroBubble cannot leave out its backward passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.bench.rivals.loop import as_bytes, broadcast
from launch.bench.rivals.placement import Placement
from pipeline.data.recipe import Recipe
from pipeline.model.given_model import ModuleModes
from pipeline.stage.evaluation import EvaluationMetrics

__all__ = ["ForwardPass"]


@dataclass
class ForwardPass:
    """The way of held-out batches through this rank's virtual stages, by index. Made in all ranks at the same time."""

    placement: Placement
    stages: Mapping[int, nn.Module]

    def __post_init__(self) -> None:
        ranks = self.placement.ranks
        # One group with a connection per directed edge: collectives of a group are matched by their order alone.
        self._groups: dict[int, Any] = {
            index: dist.new_group([ranks[index], ranks[index + 1]])
            for index in range(len(ranks) - 1)
            if ranks[index] != ranks[index + 1]
        }

    @torch.no_grad()
    def scores(self, recipe: Recipe) -> EvaluationMetrics:
        """One pass over the held-out batches in evaluation mode; the modules are in their modes of before afterwards.

        The rank of the last virtual stage has the scores, the others scores of no rows. Blocks until this rank's part
        is done, at most the time limit of the process group per message.
        """
        batches, ranks = list(recipe.held_out()), self.placement.ranks
        scores, given = EvaluationMetrics(), [inputs for inputs, _ in batches]
        sending: list[tuple[Any, Tensor]] = []
        for index, stage in self.stages.items():
            modes = ModuleModes(stage)
            modes.switch(False)
            here: list[Tensor] = []
            for x, (_, labels) in zip(given, batches, strict=True):
                if index - 1 in self._groups:
                    like = self.placement.edges[index].example(len(labels))
                    x = broadcast(like, ranks[index - 1], self._groups[index - 1])
                y = stage(x)
                if index in self._groups:
                    flat = as_bytes(y)
                    work = dist.broadcast(flat, ranks[index], group=self._groups[index], async_op=True)
                    sending.append((work, flat))  # kept until it is there
                elif index == len(ranks) - 1:
                    scores.add(recipe, y, labels)
                here.append(y)
            given = here
            modes.switch(True)
        for work, _ in sending:
            work.wait()
        return scores
