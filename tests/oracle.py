"""Single-process training as anybody would write it: the truth that locked training has to equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline import Plan, Recipe
from pipeline.data.recipe import build_model
from pipeline.seeding import seed_layer


def train_alone(recipe: Recipe, plan: Plan) -> tuple[nn.Sequential, torch.optim.Optimizer, list[float]]:
    """A plain loop over the unsplit ``nn.Sequential``; dropout is seeded per layer and (micro)batch as in a stage."""
    torch.manual_seed(0)
    model = build_model(recipe, plan.seed)
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.optimizer.lr, fused=True)
    losses, parts = [], plan.microbatches
    for step in range(plan.steps or 0):
        inputs, labels = recipe.batch(step)
        optimizer.zero_grad()
        total = 0.0
        for part, (x, y) in enumerate(zip(inputs.chunk(parts), labels.chunk(parts), strict=True)):
            for index, layer in enumerate(model):
                seed_layer(plan.seed, index, step * parts + part)
                x = layer(x)
            loss = recipe.loss(x, y) / parts
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return model, optimizer, losses


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``<parameter>.<key>`` -> state."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def assert_same(mine: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Every tensor is there and equal bit for bit."""
    assert mine.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def flat(state: object, name: str = "") -> dict[str, object]:
    """The leaves of a state (``pipeline.state``) by where they are."""
    if isinstance(state, dict):
        items = [(f"{name}/{key}", value) for key, value in state.items()]
    elif isinstance(state, list):
        items = [(f"{name}/{place}", value) for place, value in enumerate(state)]
    else:
        return {name: state}
    return {path: leaf for where, value in items for path, leaf in flat(value, where).items()}


def assert_same_state(mine: object, truth: object) -> None:
    """Two states have the same leaves: tensors bit for bit, numbers that are no numbers too."""
    one, other = flat(mine), flat(truth)
    assert one.keys() ^ other.keys() == set(), "the same leaves"
    for name, value in other.items():
        assert type(one[name]) is type(value), name
        if isinstance(value, Tensor):
            message = f"{name} differs"
            torch.testing.assert_close(one[name], value, rtol=0, atol=0, equal_nan=True, msg=message)
        else:
            assert one[name] == value, name
