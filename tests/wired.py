"""Recipes whose workers compute on the CPU and talk over a simulated wire: to import this gives the CPU one."""

from __future__ import annotations

import signal
from functools import partial

import problems
import torch.nn.functional as F
from late_device import LateEngine

from pipeline import Recipe
from workers.wiring.edges import ENGINES

ENGINES["cpu"] = LateEngine


def recipe() -> Recipe:
    """That of `problems`."""
    return problems.recipe()


def suicidal_recipe() -> Recipe:
    """Stage 1 of two is killed in batch 5."""
    model = partial(problems.suicidal, int(signal.SIGKILL))
    return Recipe(name="suicidal", model=model, batches=problems.batch, loss=F.cross_entropy)
