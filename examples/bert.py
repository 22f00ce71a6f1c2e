"""A BERT classifier of Hugging Face, as it is: dicts of named inputs, attention masks, outputs with names."""

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

from freewheel import Plan, train

WORDS = 200


def model():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, **sizes))


def batches(i):
    """Which half of the vocabulary does the first word come from?"""
    words = torch.randint(0, WORDS, (16, 24))
    mask = (torch.arange(24) < torch.randint(4, 25, (16, 1))).long()
    return {"input_ids": words, "attention_mask": mask, "labels": (words[:, 0] >= WORDS // 2).long()}


def loss(output, batch):
    return F.cross_entropy(output.logits, batch["labels"])


def correct(output, batch):
    return (output.logits.argmax(-1) == batch["labels"]).sum(), len(batch["labels"])


if __name__ == "__main__":
    held_out = [batches(-1) for _ in range(4)]
    plan = Plan(stages=2, steps=150)
    print(train(model=model, batches=batches, loss=loss, evaluation=held_out, correct=correct, plan=plan).summary())
