"""The pure library: stages, DNIs, policies, messages and the reference driver. No processes, no sockets, no clock."""

from pipeline.errors import PlanError, StageError, nearest
from pipeline.plan import ChannelPlan, DNIPlan, OptimizerPlan, Plan
from pipeline.plan_check import check_plan
from pipeline.recipe import ArrayBatches, Batch, Recipe, correct_predictions
from pipeline.reference import run_reference

__all__ = [
    "ArrayBatches",
    "Batch",
    "ChannelPlan",
    "DNIPlan",
    "OptimizerPlan",
    "Plan",
    "PlanError",
    "Recipe",
    "StageError",
    "check_plan",
    "correct_predictions",
    "nearest",
    "run_reference",
]
