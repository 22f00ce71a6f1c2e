"""No labels: two views of every image are to be alike, and unlike those of the others (SimCLR, Chen et al. 2020)."""

import torch
import torch.nn.functional as F
from torch import nn

from freewheel import Plan, train


def encoder():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU()),
        *(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32)),
    )


def batches(i):
    images = torch.randn(64, 8, 8)
    return torch.cat([images + 0.3 * torch.randn_like(images) for _ in range(2)])


def contrast(output, views):
    """Of every row the other view is the right one among all others."""
    z = F.normalize(output, dim=1)
    alike = (z @ z.T / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(alike, torch.arange(len(z)).roll(len(z) // 2))


if __name__ == "__main__":
    print(train(model=encoder, batches=batches, loss=contrast, plan=Plan(stages=2, steps=200)).summary())
