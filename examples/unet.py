"""Segmentation with long skips: a U-Net as it is; what skips travels along with what goes down."""

import torch
import torch.nn.functional as F
from torch import nn

from freewheel import Plan, train


class UNet(nn.Module):
    def __init__(self, width=8, classes=2):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)])
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ModuleList(
            [nn.Conv2d(4 * width, width, 3, padding=1), nn.Conv2d(2 * width, classes, 3, padding=1)]
        )

    def forward(self, x):
        skips = []
        for layer in self.down:
            x = F.relu(layer(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.relu(self.middle(x))
        for layer in self.up:
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return x


def batches(i):
    """Noisy images with a bright square; every pixel is to be told whether it is in it."""
    images, masks = 0.5 * torch.randn(16, 1, 16, 16), torch.zeros(16, 16, 16, dtype=torch.long)
    for image, mask in zip(images, masks, strict=True):
        row, column = torch.randint(0, 10, (2,)).tolist()
        image[0, row : row + 6, column : column + 6] += 1
        mask[row : row + 6, column : column + 6] = 1
    return images, masks


if __name__ == "__main__":
    result = train(model=UNet, batches=batches, loss=F.cross_entropy, plan=Plan(mode="1f1b", microbatches=2, steps=100))
    print(result.summary())
