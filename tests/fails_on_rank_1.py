"""A recipe file for torchrun whose fifth training pass says so, in every process, and then fails on rank 1."""

import os

from problems import CLASSES, WIDTH
from problems import batch as batches  # noqa: F401
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as loss  # noqa: F401

from pipeline import Plan

plan = Plan(steps=50, stages=2, sizes=(2, 4))


class Fails(nn.Module):
    """An identity, but for its fifth training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """Count."""
        self.passes += self.training
        if self.training and self.passes == 5:
            print("pass 5", flush=True)
            if os.environ.get("RANK") == "1":
                raise ZeroDivisionError("as planned")
        return x


def model() -> nn.Sequential:
    """Six layers."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, CLASSES), Fails())
