"""Networks that nobody here wrote, split anywhere: locked training is exact for them too, or the plan is refused.

Hypothesis draws a chain of layers with whatever people have in them and where to cut it. FREEWHEEL_EXAMPLES=1000 draws
more of them than a run of all tests has time for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import assert_same, optimizer_tensors, train_alone
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pipeline import Plan, PlanError, Recipe, run_reference
from pipeline.data.recipe import Batch, build_model

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in evaluation
SIZE, ROWS, STEPS = 6, 4, 3  # every layer takes and gives [rows, SIZE, SIZE]
FEATURES = (
    "linear",
    "activation",
    "in place, module",
    "in place, function",
    "in place, operator",
    "in place through a view",
    "dropout",
    "batch norm",
    "batch norm that stays frozen",
    "transposed",
    "permuted",
    "flattened and back",
    "gaps inside",
    "expanded inside",
    "nested",
    "parametrized",
    "forward hook",
    "pre-hook",
    "hook on a gradient",
    "frozen",
    "counts in a buffer",
    "replaces a buffer",
    "function of its own",
    "checkpoint",
    "reentrant checkpoint",
    "same module twice",
    "same module twice inside",
    "tied inside",
    "shared buffer",
)
"""What may be drawn. Left out: layers that ``model()`` gives in evaluation mode, and storages tied over a cut."""


class Function(nn.Module):
    """A function as a layer without parameters."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.call(x)


class Frozen(nn.BatchNorm1d):
    """Normalises by what it began with, whatever mode it is put in."""

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode."""
        return super().train(False)


class Running(nn.Module):
    """Subtracts a running mean, which it writes in place or replaces."""

    running: Tensor

    def __init__(self, *, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("running", torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        """Move on in training mode, then subtract."""
        if self.training:
            new = 0.9 * self.running + 0.1 * x.detach().mean((0, 1))
            if self.replaces:
                self.running = new
            else:
                self.running.copy_(new)
        return x - self.running.clone()


class Shifts(nn.Module):
    """Adds a constant buffer, perhaps one that others have too."""

    constant: Tensor

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        """Add it."""
        return x + self.constant


class Cubes(torch.autograd.Function):
    """x^3 / 3, differentiated by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Keep x."""
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """x^2 g."""
        (x,) = ctx.saved_tensors
        return x**2 * gradients[0]


class Checkpointed(nn.Module):
    """Computes its layers anew in the backward pass, if ``recomputes``."""

    recomputes = True

    def __init__(self, *layers: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = nn.Sequential(*layers), reentrant

    def forward(self, x: Tensor) -> Tensor:
        """The layers in a row."""
        if not (self.training and self.recomputes):
            return self.layers(x)
        result: Tensor = checkpoint(self.layers, x, use_reentrant=self.reentrant)
        return result


def _functional(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1, inplace=True)


def _operator(x: Tensor) -> Tensor:
    x *= 0.9
    x[..., 0] = 0.5
    return x


def _through_a_view(x: Tensor) -> Tensor:
    torch.nn.functional.relu_(x.view(-1)[: x.numel() // 2] if x.is_contiguous() else x[:1])
    return x


def _gaps(x: Tensor) -> Tensor:
    return torch.cat((x, x.tanh()), -1)[..., 1 : 1 + SIZE]


def _expanded(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True).expand_as(x)


def _doubled(module: nn.Module, given: object, output: Tensor) -> Tensor:
    return output * 2


def _halved(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0] / 2,)


def _linear() -> nn.Linear:
    return nn.Linear(SIZE, SIZE)


def _between(call: Callable[[Tensor], Tensor]) -> nn.Module:
    """Inside of a layer: what has gaps or repeats itself in memory does not cross a cut as it is."""
    return nn.Sequential(_linear(), Function(call), _linear())


def _hooked(forward: bool) -> nn.Module:
    layer = _linear()
    if forward:
        layer.register_forward_hook(_doubled)
    else:
        layer.register_forward_pre_hook(_halved)
    return layer


def _tenth(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.1)


def _gradient_hooked() -> nn.Module:
    layer = _linear()
    layer.weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    layer.bias.register_post_accumulate_grad_hook(_tenth)
    return layer


def _tied() -> nn.Module:
    one, other = _linear(), _linear()
    other.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), other)


def _checkpointed(reentrant: bool) -> nn.Module:
    return Checkpointed(_linear(), nn.Dropout(0.3), nn.Tanh(), reentrant=reentrant)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": _linear,
    "activation": nn.GELU,
    "in place, module": lambda: nn.ReLU(inplace=True),
    "in place, function": lambda: Function(_functional),
    "in place, operator": lambda: Function(_operator),
    "in place through a view": lambda: Function(_through_a_view),
    "dropout": lambda: nn.Dropout(0.4),
    "batch norm": lambda: nn.BatchNorm1d(SIZE),
    "batch norm that stays frozen": lambda: Frozen(SIZE).train(),
    "transposed": lambda: Function(lambda x: x.transpose(1, 2)),
    "permuted": lambda: Function(lambda x: x.permute(1, 0, 2).contiguous().permute(1, 0, 2)),
    "flattened and back": lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (SIZE, SIZE))),
    "gaps inside": lambda: _between(_gaps),
    "expanded inside": lambda: _between(_expanded),
    "nested": lambda: nn.Sequential(nn.Sequential(_linear(), nn.ReLU(inplace=True)), nn.Sequential(_linear())),
    "parametrized": lambda: parametrizations.weight_norm(_linear()),
    "forward hook": lambda: _hooked(True),
    "pre-hook": lambda: _hooked(False),
    "hook on a gradient": _gradient_hooked,
    "frozen": lambda: _linear().requires_grad_(False),
    "counts in a buffer": lambda: Running(replaces=False),
    "replaces a buffer": lambda: Running(replaces=True),
    "function of its own": lambda: Function(Cubes.apply),
    "checkpoint": lambda: _checkpointed(False),
    "reentrant checkpoint": lambda: _checkpointed(True),
    "same module twice inside": lambda: (lambda one: nn.Sequential(one, nn.Tanh(), one))(_linear()),
    "tied inside": _tied,
}


def build(features: tuple[str, ...], recomputes: bool = True) -> nn.Sequential:
    """A chain of these and a layer that learns."""
    shared, constant, layers = _linear(), torch.linspace(-0.1, 0.1, SIZE), list[nn.Module]()
    for feature in features:
        if feature == "same module twice":
            layers.append(shared)
        elif feature == "shared buffer":
            layers.append(Shifts(constant))
        else:
            layers.append(LAYERS[feature]())
    model = nn.Sequential(*layers, _linear())
    for module in model.modules():
        if isinstance(module, Checkpointed):
            module.recomputes = recomputes
    return model


def batch(index: int) -> Batch:
    """Random numbers, labelled by where the largest of them are."""
    inputs = torch.randn(ROWS, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
    return inputs, inputs.argmax(-1)


def loss(output: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every position."""
    return F.cross_entropy(output.flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Drawn:
    """A network and where it is cut."""

    features: tuple[str, ...]
    sizes: tuple[int, ...]

    def plan(self, mode: str, microbatches: int = 1) -> Plan:
        """To train it."""
        return Plan(mode=mode, microbatches=microbatches, steps=STEPS, stages=len(self.sizes), sizes=self.sizes)

    def recipe(self, recomputes: bool = True) -> Recipe:
        """Of the network."""
        model = partial(build, self.features, recomputes)
        return Recipe(name="drawn", model=model, batches=batch, loss=loss, evaluation=lambda: [batch(99)])


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    """At most two places of the one shared module: of three gradients the order of adding counts.

    The first layer learns: behind layers that do not, a stage's input needs a gradient that it does not need in one
    process, and torch refuses some layers in place then.
    """
    features = draw(
        st.lists(st.sampled_from(FEATURES), min_size=1, max_size=6).filter(lambda f: f.count("same module twice") < 3)
    )
    features = ["linear", *features]
    layers = len(features) + 1
    ends = draw(st.sets(st.integers(1, layers - 1), max_size=min(3, layers - 1)))
    edges = [0, *sorted(ends), layers]
    return Drawn(tuple(features), tuple(b - a for a, b in pairwise(edges)))


def _trained(case: Drawn, plan: Plan) -> Any:
    """None where the plan is refused."""
    try:
        return run_reference(case.recipe(), plan)
    except PlanError:
        return None


def _alone(case: Drawn, plan: Plan) -> Any:
    """None where torch cannot go backward through the network: two functions in place, one on the other's result."""
    try:
        return train_alone(case.recipe(recomputes=False), plan)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


def _check_exact(case: Drawn, plan: Plan) -> None:
    if (truth := _alone(case, plan)) is None or (mine := _trained(case, plan)) is None:
        return
    model, optimizer, losses = truth
    ties = mine.resolved.plan.ties
    if ties is not None:  # sums of three and more depend on their order
        for name, tensor in mine.state_tensors().items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-7)
        return
    assert_same(mine.state_tensors(), dict(model.state_dict()))
    copies = tuple(f"{name}." for names in (ties.names if ties else ()) for name in names[1:])  # each has its own state
    states = {name: state for name, state in mine.optimizer_tensors().items() if not name.startswith(copies)}
    assert_same(states, optimizer_tensors(model, optimizer))
    assert mine.losses == losses


def _check_moves(case: Drawn, plan: Plan) -> None:
    """Every parameter that the plain loop moves; a DNI below others predicts nothing before its first targets."""
    if (truth := _alone(case, plan)) is None or (mine := _trained(case, replace(plan, steps=4 * STEPS))) is None:
        return
    begun, after = dict(build_model(case.recipe(), plan.seed).named_parameters()), mine.state_tensors()
    still = [
        name
        for name, trained in truth[0].named_parameters()
        if torch.equal(after[name], begun[name]) and not torch.equal(trained, begun[name])
    ]
    assert not still, f"mode {plan.mode} leaves {', '.join(still)} as they were"


EXAMPLES = settings(
    max_examples=int(os.environ.get("FREEWHEEL_EXAMPLES", "60")),
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)


@EXAMPLES
@given(case=drawn(), mode=st.sampled_from(["naive", "gpipe", "1f1b"]))
def test_locked_training_of_any_network_is_exact(case: Drawn, mode: str) -> None:
    """Parameters, buffers, optimizer states and losses after three steps, to the last bit."""
    _check_exact(case, case.plan(mode, microbatches=1 if mode == "naive" else 2))


@EXAMPLES
@given(case=drawn(), mode=st.sampled_from(["async-1f1b", "local", "unlocked"]))
def test_unlocked_training_of_any_network_moves_what_learns(case: Drawn, mode: str) -> None:
    """No stage stays at its initial values, as those with checkpointing once did."""
    _check_moves(case, case.plan(mode))


def test_every_feature_can_be_drawn() -> None:
    assert {*LAYERS, "same module twice", "shared buffer"} == set(FEATURES)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_is_exact_on_both_sides_of_a_cut(feature: str) -> None:
    """In the first stage, above a cut and below one; each alone, where the search might not look."""
    case = Drawn(("linear", feature, "linear", feature), (2, 1, 2))
    _check_exact(case, case.plan("naive"))
    _check_exact(case, case.plan("gpipe", microbatches=2))
