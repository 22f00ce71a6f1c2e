"""Small problems that worker processes can import by name."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import posix_ipc
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import Batch, Recipe, correct_predictions

WIDTH, CLASSES, ROWS = 12, 5, 16


def dropout_and_batch_norm() -> nn.Sequential:
    """Eight layers with everything that could depend on the split: random numbers, buffers, running means."""
    return nn.Sequential(
        nn.Linear(WIDTH, 24),
        nn.BatchNorm1d(24),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(24, 24),
        nn.BatchNorm1d(24),
        nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.2)),
        nn.Linear(24, CLASSES),
    )


def eight_linear() -> nn.Sequential:
    """Eight linear layers: gradients by hand are products of matrices."""
    return nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(7)), nn.Linear(6, 3, bias=False))


def two_linear() -> nn.Sequential:
    """Two linear layers, for steps by hand."""
    return nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, CLASSES, bias=False))


def two_linear_recipe() -> Recipe:
    """Two linear layers under cross-entropy."""
    return Recipe(name="two", model=two_linear, batches=batch, loss=F.cross_entropy)


def wide(layers: int, width: int) -> nn.Sequential:
    """A perceptron whose layers take a measurable time."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers - 1)), nn.Linear(width, CLASSES))


def batch(index: int, width: int = WIDTH, rows: int = ROWS) -> Batch:
    """Random rows with labels that can be learned: the largest of the first inputs."""
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(rows, width, generator=generator)
    return inputs, inputs[:, :CLASSES].argmax(1)


def batches_that_end(index: int) -> Batch:
    """Batch 15 is not there."""
    if index == 15:
        raise OSError("disk gone")
    return batch(index)


class Speechless(RuntimeError):
    """An exception without a text."""

    def __str__(self) -> str:
        raise ValueError("no words")


def awkward_errors() -> dict[str, BaseException]:
    """Exceptions whose text is not fit to be sent, written and shown as it is."""
    chain: BaseException = OSError("the bottom")
    for depth in range(1000):
        above = RuntimeError(f"link {depth}")
        above.__cause__ = chain
        chain = above
    return {
        "surrogate": FileNotFoundError(os.fsdecode(b"caf\xe9.png")),
        "long": OSError(f"begin {'x' * 20_000_000} end"),
        "speechless": Speechless(),
        "chain": chain,
    }


def batches_that_raise(what: str, index: int) -> Batch:
    """Batch 5 is not there, for an awkward reason."""
    if index == 5:
        raise awkward_errors()[what]
    return batch(index)


class RaisesAwkwardly(nn.Module):
    """An identity that fails at its 5th training batch, for an awkward reason."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.seen = what, 0

    def forward(self, x: Tensor) -> Tensor:
        """As it is, or not."""
        self.seen += self.training
        if self.seen == 5:
            raise awkward_errors()[self.what]
        return x


def awkward(what: str) -> nn.Sequential:
    """Three layers; the second one of stage 1 (layer 2) fails in the way ``what`` when split 1 | 2."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES), RaisesAwkwardly(what))


def batches_with_a_wrong_label(index: int) -> Batch:
    """Label 9, of 5 classes, in batch 7."""
    inputs, labels = batch(index)
    return inputs, labels if index != 7 else torch.full_like(labels, 9)


def counts_badly(output: Tensor, labels: Tensor) -> Tensor:
    """Of ``correct``, but without how many answers there could be."""
    return (output.argmax(-1) == labels).sum()


def held_out(width: int = WIDTH) -> Iterator[Batch]:
    """Three batches, the last one smaller."""
    yield batch(1_000, width)
    yield batch(1_001, width)
    yield batch(1_002, width, rows=ROWS // 2)


def recipe() -> Recipe:
    """The network with dropout and BatchNorm."""
    return Recipe(
        name="problem",
        model=dropout_and_batch_norm,
        batches=batch,
        loss=F.cross_entropy,
        evaluation=held_out,
        correct=correct_predictions,
        steps=20,
    )


def wide_recipe(layers: int = 8, width: int = 256, rows: int = 64) -> Recipe:
    """A network whose steps take milliseconds."""
    return Recipe(
        name="wide",
        model=partial(wide, layers, width),
        batches=partial(batch, width=width, rows=rows),
        loss=F.cross_entropy,
        steps=30,
    )


class FailsAt(nn.Module):
    """An identity that raises when it sees its n-th training batch."""

    def __init__(self, forwards: int) -> None:
        super().__init__()
        self.left = forwards

    def forward(self, x: Tensor) -> Tensor:
        """Count down, then fail."""
        if self.training:
            self.left -= 1
            if self.left < 0:
                raise ZeroDivisionError("as planned")
        return x


def failing() -> nn.Sequential:
    """Six layers; the fourth one of stage 1 (layer 5) fails on batch 5 when split 2 | 4."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, CLASSES), FailsAt(5))


def batches_of_one_class_at_7(index: int) -> Batch:
    """Batch 7 has one class alone."""
    inputs, labels = batch(index)
    return inputs, labels if index != 7 else torch.zeros_like(labels)


def loss_that_explodes(output: Tensor, labels: Tensor) -> Tensor:
    """Infinite for a batch of one class alone."""
    return F.cross_entropy(output, labels) / float(labels.min() != labels.max())


class Suicidal(nn.Module):
    """An identity that sends its own process a signal when it sees its n-th training batch."""

    def __init__(self, forwards: int, number: int) -> None:
        super().__init__()
        self.left, self.number = forwards, number

    def forward(self, x: Tensor) -> Tensor:
        """Count down, then send the signal."""
        if self.training:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), self.number)
        return x


def suicidal(number: int) -> nn.Sequential:
    """Four layers, split 2 | 2: stage 1 gets signal ``number`` in batch 5."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), Suicidal(5, number), nn.Linear(WIDTH, CLASSES))


def _trains(module: nn.Module) -> bool:
    """Whether this is a training batch in a worker: the driver and the workers try layers out before the run."""
    return module.training and torch.is_grad_enabled() and multiprocessing.parent_process() is not None


class Tells(nn.Module):
    """An identity that releases a semaphore at every training forward."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Tell."""
        if _trains(self):
            posix_ipc.Semaphore(self.name).release()
        return x


class Listens(nn.Module):
    """An identity whose n-th training forward waits until ``Tells`` has seen batch n + 1; not for the last batch."""

    def __init__(self, name: str, steps: int, within_s: float) -> None:
        super().__init__()
        self.name, self.steps, self.within_s, self.seen = name, steps, within_s, 0

    def forward(self, x: Tensor) -> Tensor:
        """Listen."""
        if _trains(self) and self.seen < self.steps - 1:
            semaphore = posix_ipc.Semaphore(self.name)
            for _ in range(2 if self.seen == 0 else 1):
                try:
                    semaphore.acquire(self.within_s)
                except posix_ipc.BusyError:
                    raise TimeoutError("stage 0 has not gone on to the next batch") from None
            self.seen += 1
        return x


def listening(name: str, steps: int, within_s: float = 30.0) -> nn.Sequential:
    """Four layers, split 2 | 2: stage 0 tells, stage 1 listens."""
    layers = nn.Linear(WIDTH, WIDTH), Tells(name), Listens(name, steps, within_s), nn.Linear(WIDTH, CLASSES)
    return nn.Sequential(*layers)


@contextmanager
def told(steps: int) -> Iterator[str]:
    """A semaphore for ``listening``."""
    name = f"/fwtest-{os.getpid()}-{steps}"
    semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX)
    try:
        yield name
    finally:
        semaphore.unlink()
        semaphore.close()
