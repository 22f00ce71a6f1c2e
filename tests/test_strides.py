"""A stage computes on the strides that one process computes on: kernels round by them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, train_alone
from torch import Tensor, nn

from launch import train
from pipeline import Plan, Recipe, run_reference
from pipeline.data.network import stage_layers
from pipeline.data.recipe import Batch
from pipeline.messages.bundle import Item, present
from pipeline.run.resolve import resolve
from pipeline.stage.stage import Stage

ROWS, TIME, WIDTH = 8, 33, 20


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.call(x)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _sliced(x: Tensor) -> Tensor:
    return x[:, 1:33]


def _expanded(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True).expand_as(x)


def transposing() -> nn.Sequential:
    """Transposes behind a linear layer, and before one."""
    there, back = Function(_transposed), Function(_transposed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), there, nn.Linear(TIME, TIME), back, nn.Linear(WIDTH, 5))


def convolving() -> nn.Sequential:
    """Channels last."""
    return nn.Sequential(
        nn.Unflatten(1, (1, TIME)),
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, TIME, 3),
        nn.Flatten(2),
        nn.Linear((TIME - 4) * (WIDTH - 4), 5),
    ).to(memory_format=torch.channels_last)


def batch(index: int) -> Batch:
    """Random numbers and a class for each of their positions."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(ROWS, TIME, WIDTH, generator=generator), torch.randint(5, (ROWS, TIME), generator=generator)


def loss(output: Tensor, labels: Tensor) -> Tensor:
    """Of every position."""
    return F.cross_entropy(output.flatten(0, 1), labels.flatten())


def _recipe(model: Callable[[], nn.Module]) -> Recipe:
    return Recipe(name="strides", model=model, batches=batch, loss=loss)


@pytest.mark.parametrize("model", [transposing, convolving])
def test_every_cut_is_exact(model: Callable[[], nn.Sequential]) -> None:
    """Behind and before a transposition, and with channels last, messages were contiguous once."""
    truth, _, losses = train_alone(_recipe(model), Plan(mode="naive", steps=3))
    layers = len(truth)
    for cut in range(1, layers):
        plan = Plan(mode="naive", steps=3, stages=2, sizes=(cut, layers - cut))
        mine = run_reference(_recipe(model), plan)
        assert_same(mine.state_tensors(), dict(truth.state_dict()))
        assert mine.losses == losses


@pytest.mark.processes
def test_processes_compute_on_them_too(tmp_path: Path) -> None:
    """Cut behind the first transposition and before the second."""
    plan = Plan(mode="naive", steps=5, stages=3, sizes=(2, 1, 2))
    truth, _, losses = train_alone(_recipe(transposing), plan)
    mine = train(model=transposing, batches=batch, loss=loss, plan=plan, runs=tmp_path, quiet=True)
    assert_same(mine.state_tensors(), dict(truth.state_dict()))
    assert mine.losses == losses


def test_a_gradient_has_the_strides_that_autograd_gave_it() -> None:
    """`x.grad` is laid out as x is; the layer below would be given the gradient as one process gives it."""
    recipe = _recipe(transposing)
    plan = resolve(recipe, Plan(mode="naive", steps=3, stages=2, sizes=(1, 4))).plan
    stage = Stage(stage_layers(recipe, plan, 1), 1, plan, recipe)
    for step in range(3):
        stage.forward(Item(step), (torch.randn(ROWS, TIME, WIDTH),), (batch(step)[1],))
        sent = stage.backward(Item(step), None)
        stage.step(step)
        assert sent is not None
        gradient = present(sent[0])
        assert gradient.shape == (ROWS, TIME, WIDTH)
        assert gradient.stride() == (TIME * WIDTH, 1, TIME)


def _with_gaps(call: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Function(call), nn.Linear(WIDTH, 5))


@pytest.mark.parametrize("call", [_sliced, _expanded])
def test_what_does_not_travel_as_it_lies_in_memory_is_said(call: Callable[[Tensor], Tensor]) -> None:
    """The gaps of a slice and what an expanded tensor repeats; equal up to rounding then."""

    def shorter(index: int) -> Batch:
        inputs, labels = batch(index)
        return inputs, labels[:, 1:33] if call is _sliced else labels

    recipe = Recipe(name="gaps", model=partial(_with_gaps, call), batches=shorter, loss=loss)
    plan = Plan(mode="naive", steps=3, stages=2, sizes=(2, 1))
    said = {name: (value, why) for name, value, why in resolve(recipe, plan).reasons}
    assert said["cut 0"][0] == "but for rounding"
    assert "layer 1 gives a slice or an expanded tensor" in said["cut 0"][1]
    assert "cut 0" not in {name for name, _, _ in resolve(recipe, Plan(steps=3, stages=2, sizes=(1, 2))).reasons}
    truth, _, _ = train_alone(recipe, plan)
    mine = run_reference(recipe, plan).state_tensors()
    for name, tensor in truth.state_dict().items():
        torch.testing.assert_close(mine[name], tensor)
