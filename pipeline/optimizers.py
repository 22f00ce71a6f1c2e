"""The optimizer of one stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.plan import OptimizerPlan

__all__ = ["build_optimizer"]


def build_optimizer(plan: OptimizerPlan, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The planned optimizer over ``parameters``, in torch's fused form; None when there is nothing to train.

    With ``clip`` it scales their gradient down, in place, before each step, where its norm is larger (Pascanu et al.
    2013).
    """
    if not parameters:
        return None
    optimizer = _optimizer(plan, parameters)
    if (clip := plan.clip) is not None:

        def scale_down(*arguments: object) -> None:
            nn.utils.clip_grad_norm_(parameters, clip)

        optimizer.register_step_pre_hook(scale_down)
    return optimizer


def _optimizer(plan: OptimizerPlan, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    if plan.rule == "sgd":
        return torch.optim.SGD(
            parameters, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay, fused=True
        )
    rule: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[plan.rule]
    return rule(parameters, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
