"""chargpt: a small causal transformer that predicts the next character of a text file the user gives."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.recipes.ranges import check_counts
from pipeline import Batch, PlanError, Recipe, correct_predictions
from pipeline.seeding import derived_seed

__all__ = ["chargpt"]


def chargpt(
    data: Path,
    width: int = 128,
    blocks: int = 4,
    heads: int = 4,
    context: int = 64,
    batch: int = 32,
    dropout: float = 0.0,
    seed: int = 0,
) -> Recipe:
    """A character transformer: embedding, causal blocks, head.

    Args:
        data: Text file; its last tenth is held out.
        width: Width of the residual stream.
        blocks: Transformer blocks.
        heads: Attention heads; they divide the width.
        context: Characters per row.
        batch: Rows per batch.
        dropout: Dropout after attention and MLP.
        seed: Seed of the order of the data; on the command line the seed of the plan.
    """
    check_counts(width=width, blocks=blocks, heads=heads, context=context, batch=batch)
    if not 0 <= dropout < 1:
        raise PlanError(f"dropout is {dropout}: it must lie in [0, 1).")
    if width % heads:
        raise PlanError(f"heads is {heads}: it must divide the width {width}.")
    train, held_out, vocabulary = _text(Path(data))
    if len(held_out) <= max(context * batch, context + 1):
        rows = f"batches of {batch} x {context} characters"
        raise PlanError(f"{data} is too short for {rows}: lower --context or --batch.")
    return Recipe(
        name="chargpt",
        model=partial(_model, vocabulary, width, blocks, heads, context, dropout),
        batches=partial(_windows, train, context, batch, seed),
        loss=_loss,
        evaluation=partial(_held_out_batches, Path(data), context, batch),
        correct=correct_predictions,
        steps=1000,
    )


def _windows(text: Tensor, context: int, batch: int, seed: int, index: int) -> Batch:
    """Batch ``index``: rows of ``context`` characters from places that follow from (seed, index)."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "windows", index))
    starts = torch.randint(len(text) - context - 1, (batch, 1), generator=generator)
    rows = text[starts + torch.arange(context + 1)]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _held_out_batches(data: Path, context: int, batch: int) -> Iterator[Batch]:
    return (_windows(_text(data)[1], context, batch, 0, index) for index in range(10))


@cache
def _text(path: Path) -> tuple[Tensor, Tensor, int]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read as text: {error}. Give a UTF-8 text file with --data.") from error
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    codes = torch.tensor([number[character] for character in text], dtype=torch.int64)
    border = int(len(codes) * 0.9)  # the last tenth is held out
    return codes[:border], codes[border:], len(characters)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats; logits [batch, context, vocabulary], labels [batch, context]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _model(vocabulary: int, width: int, blocks: int, heads: int, context: int, dropout: float) -> nn.Sequential:
    layers = [Embedding(vocabulary, width, context), *(Block(width, heads, dropout) for _ in range(blocks))]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
    return nn.Sequential(*layers, head).apply(_initialise)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Embedding(nn.Module):
    """Characters and positions: [batch, time] -> [batch, time, width]."""

    def __init__(self, vocabulary: int, width: int, context: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)

    def forward(self, codes: Tensor) -> Tensor:
        positions: Tensor = self.positions(torch.arange(codes.shape[1], device=codes.device))
        return positions + cast(Tensor, self.characters(codes))


class Block(nn.Module):
    """A pre-norm transformer block with causal attention: [batch, time, width] -> the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self._attention(self.norm1(x)))
        return x + cast(Tensor, self.dropout(self.mlp(self.norm2(x))))

    def _attention(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.attention_in(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        return cast(Tensor, self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width)))
