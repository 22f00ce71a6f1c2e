"""What ``model()`` gives is what is trained: as a plain loop over it would, or it is refused before anything starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from torch import Tensor, nn

from launch.setup.layer_times import layer_seconds
from launch.setup.resolve_source import resolve_source
from pipeline import Batch, Plan, PlanError, Recipe, run_reference
from pipeline.data.recipe import build_model
from pipeline.model.given_model import ModuleModes
from pipeline.model.partition import layers_of
from pipeline.run.resolve import resolve
from pipeline.seeding import seed_layer

WIDTH, CLASSES, ROWS = 6, 3, 8


def _batch(index: int) -> Batch:
    inputs = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index))
    return inputs, inputs[:, :CLASSES].argmax(1)


def _recipe(model: Callable[[], Any], **parts: Any) -> Recipe:
    return Recipe(**{"name": "given", "model": model, "batches": _batch, "loss": F.cross_entropy, **parts})


def _refused(model: Callable[[], Any], **plan: Any) -> str:
    """As a chain; what is none may still be split by its own forward."""
    with pytest.raises(PlanError) as caught:
        resolve(_recipe(model), Plan(**({"split": "chain"} | plan)))
    return "\n".join(caught.value.problems)


def _plain_loop(model: nn.Module, steps: int) -> dict[str, Tensor]:
    """As anybody writes it; ``train()`` is called by nobody. Its one dropout is layer 2."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for step in range(steps):
        inputs, labels = _batch(step)
        seed_layer(0, 2, step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return dict(model.state_dict())


class Net(nn.Module):
    """A stem, a normalisation, a dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Children in a row."""
        logits: Tensor = self.head(self.drop(self.norm(self.stem(x))))
        return logits


class Frozen(Net):
    """Keeps its normalisation frozen, as detectors do."""

    def train(self, mode: bool = True) -> Frozen:
        """The normalisation stays in evaluation mode."""
        super().train(mode)
        self.norm.eval()
        return self


class FrozenNorm(nn.BatchNorm1d):
    """Keeps itself frozen."""

    def train(self, mode: bool = True) -> FrozenNorm:
        """Evaluation mode, whatever is asked for."""
        super().train(False)
        return self


def _with_eval(*names: str) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        net = Net()
        for name in names:
            net.get_submodule(name).eval()
        return net

    return model


def _all_eval() -> nn.Module:
    return Net().eval()


def _frozen() -> nn.Module:
    return Frozen().train()


def _frozen_norm() -> nn.Module:
    net = Net()
    net.norm = FrozenNorm(WIDTH)
    return net.train()


def _disabled_train() -> nn.Module:
    net = Net()
    net.norm.eval()
    net.norm.train = lambda mode=True: net.norm  # type: ignore[method-assign,assignment]
    return net


# ---------------------------------------------------------------- the mode of every module


@pytest.mark.parametrize("evaluate_every", [None, 2])
@pytest.mark.parametrize(
    "model",
    [Net, _with_eval("norm"), _with_eval("norm", "drop"), _all_eval, _frozen, _frozen_norm, _disabled_train],
    ids=["all train", "norm", "norm and dropout", "all in eval", "root's train()", "layer's train()", "disabled"],
)
def test_a_module_trains_in_the_mode_that_model_gave_it(
    model: Callable[[], nn.Module], evaluate_every: int | None
) -> None:
    """Every stage once called ``train()`` on all it had: a normalisation that was to stay frozen moved, and a dropout
    that had been switched off dropped. A look at held-out data in between does not change the modes either."""
    parts: dict[str, Any] = {"evaluation": lambda: [_batch(99)]} if evaluate_every else {}
    recipe, plan = _recipe(model, **parts), Plan(mode="naive", stages=2, sizes=(2, 2), steps=5)
    plan = Plan(mode="naive", stages=2, sizes=(2, 2), steps=5, evaluate_every=evaluate_every)
    assert_same(run_reference(recipe, plan).state_tensors(), _plain_loop(build_model(recipe, 0), 5))
    with torch.random.fork_rng():
        fresh = model()
    fresh.load_state_dict(build_model(recipe, 0).state_dict())
    assert_same(run_reference(recipe, plan).state_tensors(), _plain_loop(fresh, 5))


def test_a_train_of_the_models_own_holds_also_where_model_does_not_call_it() -> None:
    """Plain loops call ``model.train()``; who writes one that keeps a normalisation frozen wants that."""
    recipe = _recipe(Frozen)
    after = run_reference(recipe, Plan(mode="naive", stages=2, sizes=(2, 2), steps=3)).state_tensors()
    assert after["norm.num_batches_tracked"] == 0
    assert torch.equal(after["norm.running_mean"], torch.zeros(WIDTH))


def test_what_stays_in_evaluation_mode_is_said() -> None:
    reasons = resolve(_recipe(_frozen), Plan(stages=2)).reasons
    assert ("eval mode", "1 of 4 modules", "as model() and its train() leave them, in training too: norm") in reasons
    assert not [reason for reason in resolve(_recipe(Net), Plan(stages=2)).reasons if reason[0] == "eval mode"]


class DropsAlways(Net):
    """Monte Carlo dropout: evaluated with its dropout on."""

    def eval(self) -> DropsAlways:
        """All but the dropout."""
        super().eval()
        self.drop.train()
        return self


def test_an_eval_of_the_models_own_that_leaves_a_layer_in_training_is_refused() -> None:
    assert _refused(DropsAlways, stages=2) == (
        "DropsAlways.eval() leaves drop in training mode, and a pipeline evaluates every layer as its own eval() "
        "leaves it: give the layer a train() of its own."
    )


def test_modes_are_switched_there_and_back() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), FrozenNorm(2))
    net[1].eval()
    modes = ModuleModes(net)
    given = [module.training for module in net.modules()]
    modes.switch(False)
    assert not any(module.training for module in net.modules())
    modes.switch(True)
    assert [module.training for module in net.modules()] == given == [True, True, False, True]


# ---------------------------------------------------------------- hooks, parametrizations


def _doubles(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize(
    "register",
    [
        lambda net: net.register_forward_hook(_doubles),
        lambda net: net.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
        lambda net: net.register_full_backward_hook(lambda module, below, above: None),
        lambda net: net.register_full_backward_pre_hook(lambda module, above: None),
    ],
    ids=["forward", "forward pre", "backward", "backward pre"],
)
@pytest.mark.parametrize("kind", [Net, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))])
def test_a_hook_on_the_model_itself_is_refused(
    register: Callable[[nn.Module], Any], kind: Callable[[], nn.Module]
) -> None:
    """The stages never call the whole model: what hung on it once was lost without a word."""

    def model() -> nn.Module:
        net = kind()
        register(net)
        return net

    sentence = _refused(model, stages=2)
    assert " has hooks on itself (" in sentence
    assert "a pipeline calls its layers only: put them on a layer, or leave them out" in sentence


def _inner(*, hooked: bool) -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    if hooked:
        inner.register_forward_hook(_doubles)
    return nn.Sequential(inner, nn.Linear(WIDTH, CLASSES))


def test_a_hook_on_a_sequential_inside_runs() -> None:
    """The Sequential stays whole; opened, it would never be called."""
    recipe = _recipe(lambda: _inner(hooked=True))
    assert resolve(recipe, Plan(stages=2)).layer_names == ("0", "1")
    assert resolve(_recipe(lambda: _inner(hooked=False)), Plan(stages=2)).layer_names == ("0.0", "0.1", "0.2", "1")
    mine = run_reference(recipe, Plan(mode="naive", stages=2, steps=3)).state_tensors()
    assert_same(mine, _plain_loop(build_model(recipe, 0), 3))


def _normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch wants the new one
        return nn.Sequential(norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh(), norm(nn.Linear(WIDTH, CLASSES)))


@pytest.mark.parametrize("plan", [{"mode": "naive"}, {"mode": "async-1f1b"}, {"targets": "true"}], ids=str)
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=["weight norm", "spectral norm", "old weight norm", "old spectral norm"],
)
def test_a_parametrization_trains(norm: Callable[[nn.Module], nn.Module], plan: dict[str, Any]) -> None:
    """The trial run once could not copy a module with the old weight_norm: a raw traceback."""
    recipe = _recipe(lambda: _normed(norm))
    mine = run_reference(recipe, Plan(stages=2, steps=3, **plan)).state_tensors()
    layers = layers_of(build_model(recipe, 0))
    assert len(layer_seconds(layers, [_batch(0)[0]] * 3, threads=1)) == 3
    if plan == {"mode": "naive"}:
        assert_same(mine, _plain_loop(build_model(recipe, 0), 3))


# ---------------------------------------------------------------- what is no model


def _forgets() -> None:
    nn.Linear(2, 2)


def _lazy_buffer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.LazyBatchNorm1d(affine=False))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (_forgets, "model() gives None, as a function without return does: return one nn.Module, or a list of"),
        (lambda: Net, "model() gives the class Net instead of an instance, Net(...): return one nn.Module, or a list"),
        (lambda: (Net(), "adam"), "model() gives a tuple of Net, str: return one nn.Module, or a list of nn.Modules."),
        (lambda: [Net(), 3], "model() gives a list of Net, int: return one nn.Module, or a list of nn.Modules."),
        (lambda: Net().state_dict(), "model() gives a OrderedDict: return one nn.Module, or a list of nn.Modules."),
        (
            lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LazyLinear(CLASSES)),
            "1.weight of LazyLinear has no shape before a first batch: give the module its sizes, or run one batch "
            "through the model at the end of model().\n1.bias of LazyLinear",
        ),
        (lambda: [nn.LazyLinear(CLASSES, bias=False)], "0.weight of LazyLinear has no shape before a first batch"),
        (_lazy_buffer, "1.running_mean of LazyBatchNorm1d has no shape before a first batch"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight has no values (device meta): give it some in model(), on the"),
    ],
    ids=["None", "class", "tuple", "list", "state", "lazy", "lazy in a list", "lazy buffer", "meta"],
)
def test_what_is_no_model_yet_is_refused_in_a_sentence(model: Callable[[], Any], sentence: str) -> None:
    """These once ended in a raw traceback."""
    assert _refused(model, stages=1).startswith(sentence)


def test_a_lazy_model_that_has_seen_a_batch_trains() -> None:
    def model() -> nn.Module:
        net = nn.Sequential(nn.LazyLinear(WIDTH), nn.Tanh(), nn.LazyLinear(CLASSES))
        net(_batch(0)[0])
        return net

    recipe = _recipe(model)
    mine = run_reference(recipe, Plan(mode="naive", stages=2, steps=3)).state_tensors()
    assert_same(mine, _plain_loop(build_model(recipe, 0), 3))


def a_list() -> Recipe:
    """Gives the modules themselves."""
    return _recipe([nn.Linear(2, 2)])  # type: ignore[arg-type]


def test_a_model_that_is_no_function_is_refused() -> None:
    with pytest.raises(PlanError, match="model is a list: give the function that builds it"):
        resolve_source(a_list, Plan(stages=1))
