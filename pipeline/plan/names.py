"""The names that a plan may choose from, where no other file has a table of them."""

import torch

__all__ = ["DNI_FORMS", "DTYPES", "OPTIMIZERS", "SCHEDULES", "TARGETS"]

DTYPES = {"bf16": torch.bfloat16}
"""What float32 may be narrowed to: in products of matrices (autocast), and on the way between stages."""
TARGETS = ("bootstrap", "true", "mixed")
OPTIMIZERS = ("sgd", "adam", "adamw", "nadamw")
SCHEDULES = ("constant", "linear", "cosine")
DNI_FORMS = ("auto", "linear", "mlp", "conv", "label_residual", "loss_model")
