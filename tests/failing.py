"""A recipe file whose layer 5 fails on batch 5."""

from problems import batch as batches  # noqa: F401
from problems import failing as model  # noqa: F401
from torch.nn.functional import cross_entropy as loss  # noqa: F401

from pipeline import Plan

plan = Plan(mode="naive", steps=1000, stages=2, sizes=(2, 4))
