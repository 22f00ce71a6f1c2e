"""Replicated pipelines: which worker runs what, on which data, with which random numbers.

                 stage 0    stage 1    stage 2          K = 3 stages, R = 2 replicas
    replica 0   worker 0   worker 1   worker 2          step i trains on batch 2 i
    replica 1   worker 3   worker 4   worker 5          step i trains on batch 2 i + 1

All replicas start from the same weights. What is random in a layer differs between them, and the first weights of DNIs.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.plan.plan import Plan
from pipeline.schedule.modes import MODES
from pipeline.schedule.policies import Policy, averaged
from pipeline.seeding import derived_seed

__all__ = ["batch_of", "called", "plan_of", "policy_of", "worker_of"]


def worker_of(plan: Plan, replica: int, stage: int) -> int:
    """The number of a worker; without replicas that of its stage."""
    return replica * plan.stages + stage


def batch_of(plan: Plan, replica: int, step: int) -> int:
    """The batch of the recipe that a replica trains on in a step."""
    return step * plan.replicas + replica


def plan_of(plan: Plan, replica: int) -> Plan:
    """The plan as a replica's stages see it: replica 0 has the run's seed, every other one a seed of its own."""
    return plan if replica == 0 else replace(plan, seed=derived_seed(plan.seed, "replica", replica))


def policy_of(plan: Plan) -> Policy:
    """The mode's policy, which where there are replicas says too when averages are taken."""
    policy = MODES[plan.mode].policy
    return averaged(policy) if plan.replicas > 1 or plan.ties is not None else policy


def called(plan: Plan, replica: int, stage: int) -> str:
    """What users see a worker called: ``stage 1``, or ``replica 0, stage 1`` where there are several."""
    return f"stage {stage}" if plan.replicas == 1 else f"replica {replica}, stage {stage}"
