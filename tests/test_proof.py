"""The layers in a row are the model, in training too, and no two stages hold the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from torch import Tensor, nn

from pipeline import Batch, Plan, PlanError, Recipe, run_reference
from pipeline.data.recipe import build_model
from pipeline.run.resolve import resolve
from pipeline.run.resolved import Resolved

WIDTH, CLASSES, ROWS = 6, 3, 8


def _batch(index: int) -> Batch:
    inputs = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index))
    return inputs, inputs[:, :CLASSES].argmax(1)


def _recipe(model: Callable[[], Any], **parts: Any) -> Recipe:
    return Recipe(**{"name": "proof", "model": model, "batches": _batch, "loss": F.cross_entropy, **parts})


def _resolve(model: Callable[[], Any], **plan: Any) -> Resolved:
    return resolve(_recipe(model), Plan(**plan))


def _refused(model: Callable[[], Any], **plan: Any) -> str:
    """As a chain; what is none may still be split by its own forward."""
    with pytest.raises(PlanError) as caught:
        _resolve(model, **({"split": "chain"} | plan))
    (problem,) = caught.value.problems
    return problem


class Net(nn.Module):
    """A chain as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """All but the head."""
        hidden: Tensor = self.drop(self.norm(self.stem(x)))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """Children in a row."""
        logits: Tensor = self.head(self.features(x))
        return logits


# ---------------------------------------------------------------- in training mode


class DropsOut(Net):
    """What timm's ``drop_rate`` does."""

    def forward(self, x: Tensor) -> Tensor:
        """With a dropout that is no child."""
        logits: Tensor = self.head(F.dropout(self.features(x), 0.1, self.training))
        return logits


class Noisy(Net):
    """Adds noise in training."""

    def forward(self, x: Tensor) -> Tensor:
        """To its inputs."""
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


class Branches(Net):
    """Skips a child in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Without its normalisation."""
        if not self.training:
            return super().forward(x)
        logits: Tensor = self.head(self.drop(self.stem(x)))
        return logits


class Auxiliary(Net):
    """Gives a second output in training, as GoogLeNet does."""

    def forward(self, x: Tensor) -> Any:
        """One tensor, or two."""
        return (super().forward(x), x) if self.training else super().forward(x)


class NestedNoise(nn.Sequential):
    """A Sequential whose forward is its own in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Noise behind everything."""
        y: Tensor = super().forward(x)
        return y + torch.rand_like(y) if self.training else y


def _nested_noise() -> nn.Module:
    return NestedNoise(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))


def _patched() -> nn.Module:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    plain = net.forward
    net.forward = lambda x: F.dropout(plain(x), 0.5, net.training)  # type: ignore[method-assign]
    return net


@pytest.mark.parametrize("model", [DropsOut, Noisy, Branches, Auxiliary, _nested_noise])
def test_a_forward_that_is_another_in_training_is_refused(model: Callable[[], nn.Module]) -> None:
    """The chain once was proved in evaluation mode alone, and what a forward does in training was dropped."""
    sentence = _refused(model, stages=2)
    assert ".forward in training mode does not compute the chain of its children (" in sentence
    assert "though in evaluation mode it does: make what it does in training only" in sentence


def test_a_forward_set_on_the_model_itself_is_refused() -> None:
    """A function set on one object belongs to that one; its copies would call it, too."""
    assert _refused(_patched, stages=2).startswith("the forward of this one Sequential was replaced by a function")


class TwiceNormalised(Net):
    """Counts every batch twice."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalisation sees another batch too."""
        if self.training:
            self.norm(x)
        return super().forward(x)


def test_a_forward_that_leaves_other_buffers_is_refused() -> None:
    assert _refused(TwiceNormalised, stages=2).startswith(
        "TwiceNormalised.forward in training mode does not leave the values in norm.running_mean, norm.running_var, "
        "norm.num_batches_tracked that the chain of its children leaves"
    )


class Detached(Net):
    """Trains its head only."""

    def forward(self, x: Tensor) -> Tensor:
        """No gradient for what is below the head."""
        logits: Tensor = self.head(self.features(x).detach())
        return logits


class WithoutGradients(Net):
    """Trains its head only, too."""

    def forward(self, x: Tensor) -> Tensor:
        """Features as if they were frozen."""
        with torch.no_grad():
            hidden = self.features(x)
        logits: Tensor = self.head(hidden)
        return logits


class Reversed(Net):
    """Adversarial: the features learn to be of no use."""

    def forward(self, x: Tensor) -> Tensor:
        """Turns the gradient round."""
        hidden = self.features(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: -gradient)
        logits: Tensor = self.head(hidden)
        return logits


@pytest.mark.parametrize("model", [Detached, WithoutGradients, Reversed])
def test_a_forward_with_other_gradients_is_refused(model: Callable[[], nn.Module]) -> None:
    """It computes the chain to the last bit, and learns something else: the stages once trained all of it."""
    assert _refused(model, stages=2).startswith(
        f"{model.__name__}.forward in training mode does not give stem.weight, stem.bias, norm.weight, norm.bias the "
        "gradients that the chain of its children gives"
    )


class WholeBatches(Net):
    """Takes batches of one size."""

    def forward(self, x: Tensor) -> Tensor:
        """Reshapes by the number of rows."""
        return super().forward(x.view(ROWS, WIDTH))


class WholeBatchesNoisy(Noisy):
    """Takes batches of one size, and adds noise in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Reshapes by the number of rows."""
        return super().forward(x.view(ROWS, WIDTH))


def test_a_forward_that_is_a_chain_in_training_passes() -> None:
    """With dropout and batch normalisation in it: both sides draw the same numbers, on copies."""
    assert _resolve(Net, stages=2, sizes=(2, 2)).sizes == (2, 2)
    assert _resolve(WholeBatches, stages=2, sizes=(2, 2)).sizes == (2, 2)
    assert "in training mode" in _refused(WholeBatchesNoisy, stages=2)


class Saturated(Net):
    """Ends in a softmax, whose sum no weight changes."""

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities, from features that get no gradient."""
        probabilities: Tensor = self.soft(self.head(self.features(x).detach()))
        return probabilities

    def __init__(self) -> None:
        super().__init__()
        self.soft = nn.Softmax(-1)


def test_gradients_are_compared_for_a_gradient_that_is_not_the_same_everywhere() -> None:
    assert "does not give stem.weight" in _refused(Saturated, stages=2)


class FailsInTraining(Net):
    """Has a mistake that evaluation does not meet."""

    def forward(self, x: Tensor) -> Tensor:
        """Divides by zero."""
        return super().forward(x / (0 if self.training else 1) if not self.training else x + 1 // 0)


def test_a_forward_that_fails_in_training_is_said_to() -> None:
    assert _refused(FailsInTraining, stages=2).startswith(
        "FailsInTraining.forward in training mode raises ZeroDivisionError: integer division or modulo by zero"
    )


def test_the_proof_leaves_model_and_random_numbers_as_they_are() -> None:
    """It works on copies, and what is drawn in it is drawn aside."""
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    resolve(_recipe(lambda: net), Plan(stages=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(dict(net.state_dict()), before)
    assert all(parameter.grad is None for parameter in net.parameters())


# ---------------------------------------------------------------- what holds nothing that could run


class Scales(nn.Module):
    """Keeps parameters in a list beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(WIDTH))])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Uses them itself."""
        logits: Tensor = self.head(x * self.scales[0])
        return logits


def test_a_list_of_parameters_is_no_layer() -> None:
    assert _refused(Scales, stages=1) == (
        "layer scales is a ParameterList, which has no forward: move what it holds into the layers that compute with "
        "it."
    )


class Borrows(nn.Module):
    """A head whose weight is that of another layer, hidden from ``parameters()`` by a list."""

    def __init__(self, lender: nn.Linear) -> None:
        super().__init__()
        self.lender = [lender]

    def forward(self, x: Tensor) -> Tensor:
        """The other layer's weight, backwards."""
        return F.linear(x, self.lender[0].weight.t())


def test_a_layer_that_reaches_for_the_weight_of_another_is_refused() -> None:
    """It once computed with the other's initial weight for ever: that layer trains in another process."""

    def model() -> nn.Module:
        lender = nn.Linear(WIDTH, WIDTH)
        return nn.Sequential(lender, nn.Tanh(), Borrows(lender), nn.Linear(WIDTH, CLASSES))

    assert _refused(model, stages=2).startswith("layer 2 computes with 0.weight, which it does not hold: a layer")


# ---------------------------------------------------------------- memory in common


def _layers() -> list[nn.Linear]:
    return [nn.Linear(WIDTH, WIDTH) for _ in range(3)]


def _same_data() -> nn.Module:
    a, b, c = _layers()
    b.weight.data = a.weight.data
    return nn.Sequential(a, nn.Tanh(), b, c)


def _overlapping() -> nn.Module:
    a, b, c = _layers()
    memory = torch.randn(2 * WIDTH, WIDTH)
    a.weight.data, b.weight.data = memory[:WIDTH], memory[1 : WIDTH + 1]
    return nn.Sequential(a, nn.Tanh(), b, c)


def _transposed() -> nn.Module:
    a, b, c = _layers()
    b.weight.data = a.weight.data.t()
    return nn.Sequential(a, nn.Tanh(), b, c)


def _parameter_and_buffer() -> nn.Module:
    a, b, c = _layers()
    b.register_buffer("seen", a.weight.data[0])
    return nn.Sequential(a, nn.Tanh(), b, c)


def _beside_each_other() -> nn.Module:
    a, b, c = _layers()
    memory = torch.randn(2 * WIDTH, WIDTH)
    a.weight.data, b.weight.data = memory[:WIDTH], memory[WIDTH:]
    return nn.Sequential(a, nn.Tanh(), b, c)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (_same_data, ("0.weight", "2.weight")),
        (_overlapping, ("0.weight", "2.weight")),
        (_transposed, ("0.weight", "2.weight")),
        (_parameter_and_buffer, ("0.weight", "2.seen")),
    ],
    ids=["data", "overlap", "transposed", "parameter and buffer"],
)
@pytest.mark.parametrize("plan", [{"sizes": (2, 2)}, {"balance": "layers"}, {}], ids=str)
def test_memory_that_two_stages_share_is_refused_with_both_names(
    model: Callable[[], nn.Module], names: tuple[str, str], plan: dict[str, Any]
) -> None:
    """Tied by ``.data``, two weights are two Parameters: they once were split, and trained apart without a word."""
    assert _refused(model, stages=2, **plan) == (
        f"{names[0]} (stage 0) and {names[1]} (stage 1) share their memory: tied weights cannot be split over stages; "
        "put both into one stage, or untie them."
    )


@pytest.mark.parametrize("model", [_same_data, _overlapping, _beside_each_other], ids=lambda model: model.__name__)
def test_memory_shared_inside_a_stage_trains_as_in_a_plain_loop(model: Callable[[], nn.Module]) -> None:
    sizes = (2, 2) if model is _beside_each_other else (3, 1)
    recipe, plan = _recipe(model), Plan(mode="naive", stages=2, sizes=sizes, steps=6)
    alone = build_model(recipe, 0)
    optimizer = torch.optim.Adam(alone.parameters(), lr=plan.optimizer.lr, fused=True)
    for step in range(6):
        inputs, labels = _batch(step)
        optimizer.zero_grad()
        F.cross_entropy(alone(inputs), labels).backward()
        optimizer.step()
    assert_same(run_reference(recipe, plan).state_tensors(), dict(alone.state_dict()))


def test_one_module_of_a_list_in_two_stages_is_tied() -> None:
    twice = nn.Linear(WIDTH, WIDTH)
    for kind in (list, nn.ModuleList):
        given = kind([twice, nn.Tanh(), twice, nn.Linear(WIDTH, CLASSES)])
        ties = _resolve(lambda given=given: given, stages=2, sizes=(2, 2)).plan.ties  # type: ignore[misc]
        assert ties is not None
        assert ties.names == (("0.weight", "2.weight"), ("0.bias", "2.bias"))
