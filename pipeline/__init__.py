"""The pure library: stages, DNIs, policies, messages and the reference driver. No processes, no sockets, no clock."""

from pipeline.data.recipe import ArrayBatches, Batch, Recipe, correct_predictions
from pipeline.errors import PlanError, StageError, nearest
from pipeline.plan.check import check_plan
from pipeline.plan.plan import ChannelPlan, DNIPlan, OptimizerPlan, Plan
from pipeline.run.reference import run_reference

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
