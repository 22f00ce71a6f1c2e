"""Llama from a configuration, as it is: its rotary angles are computed by every stage for itself."""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from freewheel import Plan, train


def model():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))


def batches(i):
    """Count on from where a sequence begins."""
    counted = (torch.randint(0, 32, (16, 1)) + torch.arange(17)) % 32
    return counted[:, :-1], counted[:, 1:]


def loss(output, following):
    return F.cross_entropy(output.logits.flatten(0, 1), following.flatten())


if __name__ == "__main__":
    print(
        train(
            model=model, batches=batches, loss=loss, plan=Plan(stages=3, mode="1f1b", microbatches=4, steps=60)
        ).summary()
    )
