"""A tag for every word: an LSTM between other layers, updates unlocked."""

import torch
from torch import nn

from freewheel import Plan, correct_predictions, train

WORDS, TAGS = 50, 3


class Tagger(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed, self.norm = nn.Embedding(WORDS, width), nn.LayerNorm(width)
        self.lstm, self.tag = nn.LSTM(width, width, batch_first=True), nn.Linear(width, TAGS)

    def forward(self, words):
        seen, _ = self.lstm(self.norm(self.embed(words)))
        return self.tag(seen)


def batches(i):
    """The tag of a word depends on the one before it."""
    words = torch.randint(0, WORDS, (32, 12))
    return words, (words + words.roll(1, dims=1)) % TAGS


def loss(output, tags):
    return nn.functional.cross_entropy(output.flatten(0, 1), tags.flatten())


if __name__ == "__main__":
    held_out = [batches(-1)]
    plan = Plan(stages=2, steps=300)
    result = train(
        model=Tagger, batches=batches, loss=loss, evaluation=held_out, correct=correct_predictions, plan=plan
    )
    print(result.summary())
