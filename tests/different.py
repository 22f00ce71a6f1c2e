"""A recipe file that is not the same on every host: the network of rank 1 is wider."""

import os

from problems import CLASSES, WIDTH
from problems import batch as batches  # noqa: F401
from torch import nn
from torch.nn.functional import cross_entropy as loss  # noqa: F401

from pipeline import Plan

plan = Plan(mode="naive", steps=10, stages=2, sizes=(1, 2))


def model() -> nn.Sequential:
    """Three layers."""
    width = 8 + int(os.environ.get("RANK", "0"))
    return nn.Sequential(nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, CLASSES))
