"""A recipe file whose worker says with how many threads it computes, three times."""

import os

import torch
from problems import batch as batches  # noqa: F401
from problems import dropout_and_batch_norm
from problems import held_out as evaluation  # noqa: F401
from torch import nn
from torch.nn.functional import cross_entropy as loss  # noqa: F401

from pipeline import Plan

plan = Plan(mode="naive", steps=5, stages=2, sizes=(4, 4), threads=2)


class Counts(nn.Module):
    """An identity that looks at the threads in training."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Look."""
        if self.training and self.left:
            self.left -= 1
            seen = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("MKL_NUM_THREADS")
            print(f"threads {seen[0]} {seen[1]} {seen[2]}", flush=True)
        return x


def model() -> nn.Sequential:
    """Eight layers."""
    layers = list(dropout_and_batch_norm())
    layers[6] = Counts()
    return nn.Sequential(*layers)
