"""The optimizer of one stage; its learning-rate schedule and its clip hang on it, so whoever has one trains alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.plan.plan import OptimizerPlan

__all__ = ["build_optimizer", "described", "lr_factor", "optimizer_tensors"]


def build_optimizer(
    plan: OptimizerPlan, parameters: Sequence[nn.Parameter], steps: int | None = None
) -> torch.optim.Optimizer | None:
    """The planned optimizer over ``parameters``; None when there is nothing to train.

    With ``clip`` = c it scales their gradient g down, in place, before each step: g <- g min(1, c / |g|), |g| the
    Euclidean norm over all of ``parameters`` (Pascanu et al. 2013, section 3.2), so a split model is clipped otherwise
    than an unsplit one. True and synthetic gradients are clipped alike.

    With ``warmup_steps`` or ``schedule`` the learning rate of step t is ``lr * lr_factor(plan, steps)(t)``. t is
    ``num_steps`` of the parameter group, so the optimizer's ``state_dict`` holds the whole schedule.

    Rule ``nadamw``, a remedy for late gradients (Ajanthan et al. 2025, Nesterov Method for Asynchronous Pipeline
    Parallel Optimization, arXiv 2505.01099), is torch's NAdam with decoupled weight decay:

        m <- mu m + (1 - mu) g        v <- 0.999 v + 0.001 g^2
        w <- w - lr ((1 - mu_t) g / (1 - M_t) + mu_(t+1) m / (1 - M_(t+1))) / (sqrt(v / (1 - 0.999^t)) + eps)

    with mu = ``momentum``, mu_t = mu (1 - 0.96^(0.004 t) / 2) and M_t their product. With mu = 0.99 the late gradient
    counts little in its own step (it is discounted by 1 - mu_t) and the step looks ahead along m.

    ``steps`` is the length of the run, needed for the schedules that end.
    """
    if not parameters:
        return None
    make, options = _RULES[plan.rule]
    optimizer = make(parameters, lr=plan.lr, weight_decay=plan.weight_decay, **options(plan))
    if (clip := plan.clip) is not None:

        def scale_down(*arguments: object) -> None:
            nn.utils.clip_grad_norm_(parameters, clip)

        optimizer.register_step_pre_hook(scale_down)
    if plan.warmup_steps or plan.schedule != "constant":
        factor = lr_factor(plan, steps)
        (group,) = optimizer.param_groups
        group["num_steps"], group["lr"] = 0, plan.lr * factor(0)

        def go_on(stepped: torch.optim.Optimizer, *arguments: object) -> None:
            (group,) = stepped.param_groups
            group["num_steps"] += 1
            group["lr"] = plan.lr * factor(group["num_steps"])

        optimizer.register_step_post_hook(go_on)
    return optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an optimizer, if there is one, as ``<parameter name>.<key>``, e.g. ``0.weight.exp_avg``.

    ``tensors``: the parameters by their names; one that is tied has the first of its names.
    """
    if optimizer is None:
        return {}
    names = {id(tensor): name for name, tensor in reversed([*tensors.items()])}
    return {
        f"{names[id(parameter)]}.{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def lr_factor(plan: OptimizerPlan, steps: int | None) -> Callable[[int], float]:
    """What the learning rate of step t = 0, 1, ... is multiplied with.

    (t + 1) / W in the first W = ``warmup_steps`` steps; then, with T = ``steps`` and p = (t - W) / (T - W), 1, 1 - p
    (``linear``), or (1 + cos(pi p)) / 2 (``cosine``; Loshchilov and Hutter 2017, without restarts).
    """
    assert steps is not None or plan.schedule == "constant", "a schedule that ends needs the length of the run"
    warmup, decay = plan.warmup_steps, _DECAYS[plan.schedule]
    left = max(1, (steps or 0) - warmup)

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else decay(min(1.0, (step - warmup) / left))

    return factor


def described(plan: OptimizerPlan) -> str:
    """``adam, lr 0.001, warm-up of 200 steps, cosine to 0``."""
    parts = (
        plan.rule,
        f"lr {plan.lr:g}",
        f"momentum {_momentum(plan):g}" if plan.rule == "nadamw" else "",
        f"warm-up of {plan.warmup_steps:,} steps" if plan.warmup_steps else "",
        f"{plan.schedule} to 0" if plan.schedule != "constant" else "",
        f"clip {plan.clip:g}" if plan.clip is not None else "",
    )
    return ", ".join(filter(None, parts))


def _momentum(plan: OptimizerPlan) -> float:
    if plan.momentum is not None:
        return plan.momentum
    return 0.99 if plan.rule == "nadamw" else 0.0  # Ajanthan et al. 2025


_RULES: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[OptimizerPlan], dict[str, Any]]]] = {
    "sgd": (torch.optim.SGD, lambda plan: {"momentum": _momentum(plan), "fused": True}),
    "adam": (torch.optim.Adam, lambda plan: {"fused": True}),
    "adamw": (torch.optim.AdamW, lambda plan: {"fused": True}),
    "nadamw": (  # it has no fused form
        torch.optim.NAdam,
        lambda plan: {"betas": (_momentum(plan), 0.999), "decoupled_weight_decay": True, "foreach": True},
    ),
}
"""Per rule its class, and what it is given besides learning rate and weight decay."""
_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "linear": lambda p: 1.0 - p,
    "cosine": lambda p: (1.0 + math.cos(math.pi * p)) / 2,
}
