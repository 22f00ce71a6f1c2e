"""The optimizer of one stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.plan import OptimizerPlan

__all__ = ["build_optimizer"]


def build_optimizer(plan: OptimizerPlan, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The planned optimizer over ``parameters``, in torch's fused form; None when there is nothing to train."""
    if not parameters:
        return None
    if plan.rule == "sgd":
        return torch.optim.SGD(
            parameters, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay, fused=True
        )
    rule: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[plan.rule]
    return rule(parameters, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
