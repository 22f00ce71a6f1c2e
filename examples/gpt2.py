"""GPT-2 of Hugging Face on characters, as it is. Its head is its embedding: both stages have a copy, and agree."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from freewheel import Plan, train

TEXT = "the quick brown fox jumps over the lazy dog. " * 200
LETTERS = sorted(set(TEXT))
CODES = torch.tensor([LETTERS.index(letter) for letter in TEXT])


def model():
    sizes = {"n_positions": 32, "n_embd": 64, "n_layer": 4, "n_head": 4}
    special = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(LETTERS), **sizes, **special))


def loss(output, following):
    return F.cross_entropy(output.logits.flatten(0, 1), following.flatten())


if __name__ == "__main__":
    windows = CODES[: len(CODES) // 33 * 33].view(-1, 33)
    pairs = [(window[:-1], window[1:]) for window in windows]
    loader = DataLoader(pairs, batch_size=16, shuffle=True, drop_last=True)
    print(train(model=model, batches=loader, loss=loss, plan=Plan(stages=2, steps=150)).summary())
