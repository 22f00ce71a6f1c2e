"""A recipe file as a user writes one: it never ends by itself."""

from problems import batch as batches  # noqa: F401
from problems import dropout_and_batch_norm as model  # noqa: F401
from problems import held_out as evaluation  # noqa: F401
from torch.nn.functional import cross_entropy as loss  # noqa: F401

from pipeline import Plan

plan = Plan(steps=10_000_000, stages=2, sizes=(4, 4), evaluate_every=100)  # a line on stdout each time
