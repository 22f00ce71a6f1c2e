"""The names that a plan may choose from, where no other file has a table of them."""

from __future__ import annotations

__all__ = ["DNI_FORMS", "OPTIMIZERS", "SCHEDULES", "TARGETS"]

TARGETS = ("bootstrap", "true", "mixed")
OPTIMIZERS = ("sgd", "adam", "adamw", "nadamw")
SCHEDULES = ("constant", "linear", "cosine")
DNI_FORMS = ("auto", "linear", "mlp", "conv", "label_residual", "loss_model")
