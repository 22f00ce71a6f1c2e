"""mnist: the MNIST images from their original IDX files, read from a folder that the user gives."""

from __future__ import annotations

import gzip
import math
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from launch.recipes.perceptron import check_activation, image_recipe, perceptron
from launch.recipes.ranges import check_counts
from pipeline import Batch, PlanError, Recipe

__all__ = ["mnist"]

_MEAN, _STD = 0.1307, 0.3081  # of the training pixels


def mnist(
    data: Path,
    hidden: int = 256,
    layers: int = 6,
    batch: int = 256,
    batch_norm: bool = True,
    activation: str = "relu",
    seed: int = 0,
) -> Recipe:
    """A perceptron on MNIST.

    Args:
        data: Folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each plain or .gz.
        hidden: Units per hidden layer.
        layers: Layers, the last one included.
        batch: Rows per batch.
        batch_norm: BatchNorm after every hidden linear layer.
        activation: Activation function: relu, gelu, silu or tanh.
        seed: Seed of the order of the data; on the command line the seed of the plan.
    """
    check_counts(hidden=hidden, layers=layers, batch=batch)
    check_activation(activation)
    model = partial(perceptron, 28 * 28, hidden, layers, 10, batch_norm=batch_norm, activation=activation)
    return image_recipe("mnist", model, partial(_data, Path(data)), batch, seed, steps=2000)


@cache
def _data(folder: Path, part: str) -> Batch:
    images = _idx(folder, f"{part}-images-idx3-ubyte", (28, 28))
    labels = _idx(folder, f"{part}-labels-idx1-ubyte", ())
    if len(images) != len(labels):
        counts = f"{len(images)} {part} images and {len(labels)} labels"
        raise PlanError(f"{folder} has {counts}: the files do not belong together.")
    inputs = torch.from_numpy(images.reshape(len(images), -1)).float().div_(255.0).sub_(_MEAN).div_(_STD)
    return inputs, torch.from_numpy(labels.astype(np.int64))


def _idx(folder: Path, name: str, each: tuple[int, ...]) -> np.ndarray:
    """An IDX file of bytes, [number, *each]: 0 0 8 ndim, then each size as a big-endian int32, then the values."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise PlanError(f"no {name} (or {name}.gz) in {folder}: give the folder of the MNIST files with --data.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise PlanError(f"{path} cannot be read: {error}.") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise PlanError(f"{path} is no IDX file of bytes: it begins with {content[:4].hex()}, not 000008.")
    begin = 4 + 4 * content[3]
    if len(content) < begin:
        raise PlanError(f"{path} is cut short: {len(content)} bytes, its header alone has {begin}.")
    sizes = np.frombuffer(content, ">i4", count=content[3], offset=4).tolist()
    if not sizes or sizes[1:] != list(each) or sizes[0] < 1:
        raise PlanError(f"{path} has the shape {sizes}, not {['number', *each]}: it is no such MNIST file.")
    values = np.frombuffer(content, np.uint8, offset=begin)
    if values.size != math.prod(sizes):
        raise PlanError(f"{path} is cut short: {values.size} values where its header says {math.prod(sizes)}.")
    return values.reshape(sizes).copy()
