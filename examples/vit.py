"""A vision transformer of Hugging Face, as it is, from a configuration; updates unlocked."""

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from freewheel import Plan, train


def model():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=4, **sizes))


def batches(i):
    """Which quarter of the image is bright?"""
    images, quarter = 0.5 * torch.randn(32, 1, 16, 16), torch.randint(0, 4, (32,))
    for image, place in zip(images, quarter.tolist(), strict=True):
        row, column = 8 * (place // 2), 8 * (place % 2)
        image[0, row : row + 8, column : column + 8] += 1
    return images, quarter


def loss(output, quarter):
    return F.cross_entropy(output.logits, quarter)


def correct(output, quarter):
    return (output.logits.argmax(-1) == quarter).sum(), len(quarter)


if __name__ == "__main__":
    plan, held_out = Plan(stages=2, steps=100), [batches(-1)]
    print(train(model=model, batches=batches, loss=loss, evaluation=held_out, correct=correct, plan=plan).summary())
