"""From a model to stages: nothing is lost, and what cannot be split is refused with names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same, optimizer_tensors, train_alone
from torch import Tensor, nn

from launch.setup.layer_times import layer_seconds
from pipeline import Batch, OptimizerPlan, Plan, PlanError, Recipe, run_reference
from pipeline.data.network import stage_layers
from pipeline.data.recipe import build_model
from pipeline.messages.bundle import Bundle, Item, present
from pipeline.model.partition import balanced_sizes, balanced_split, depth_of, ends_normalised, layers_of
from pipeline.plan.plan import DNIPlan
from pipeline.run.resolve import resolve
from pipeline.run.resolved import Resolved
from pipeline.stage.stage import Stage

WIDTH, CLASSES, ROWS = 6, 3, 8


def _batch(index: int) -> Batch:
    inputs = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index))
    return inputs, inputs[:, :CLASSES].argmax(1)


def _recipe(model: Callable[[], Any], **parts: Any) -> Recipe:
    return Recipe(**{"name": "chain", "model": model, "batches": _batch, "loss": F.cross_entropy, **parts})


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _resolve(model: Callable[[], Any], **plan: Any) -> Resolved:
    return resolve(_recipe(model), Plan(**plan))


def _refused(model: Callable[[], Any], **plan: Any) -> str:
    """As a chain; what is none may still be split by its own forward."""
    with pytest.raises(PlanError) as caught:
        _resolve(model, **({"split": "chain"} | plan))
    (problem,) = caught.value.problems
    return problem


# ---------------------------------------------------------------- balance


def _best(costs: list[int], stages: int) -> int:
    """Cost of the most expensive group in the best of all splits, by trying them all."""
    cuts = combinations(range(1, len(costs)), stages - 1)
    return min(max(sum(costs[a:b]) for a, b in _spans(cut, len(costs))) for cut in cuts)


def _spans(cuts: tuple[int, ...], end: int) -> list[tuple[int, int]]:
    return list(zip((0, *cuts), (*cuts, end), strict=True))


@settings(deadline=None, max_examples=150)
@given(costs=st.lists(st.integers(0, 50), min_size=1, max_size=9), data=st.data())
def test_the_balance_is_the_best_of_all_splits(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    sizes = balanced_sizes([float(cost) for cost in costs], stages)
    assert len(sizes) == stages
    assert min(sizes) >= 1
    assert sum(sizes) == len(costs)
    ends = [sum(sizes[: k + 1]) for k in range(stages)]
    assert max(sum(costs[end - size : end]) for size, end in zip(sizes, ends, strict=True)) == _best(costs, stages)


@pytest.mark.parametrize(
    ("costs", "sizes"),
    [
        ([1, 1, 1, 1, 1, 1, 1, 1], (2, 2, 2, 2)),
        ([1, 1, 1, 9], (3, 1)),
        ([9, 1, 1, 1], (1, 3)),
        ([1, 2, 3, 4, 5], (3, 2)),
        ([1, 1, 1, 1, 1], (2, 3)),  # among equals the earlier cut
        ([5], (1,)),
    ],
    ids=str,
)
def test_balanced_by_hand(costs: list[float], sizes: tuple[int, ...]) -> None:
    assert balanced_sizes(costs, len(sizes)) == sizes


def _pairs(count: int) -> list[nn.Module]:
    return [module for _ in range(count) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]


@pytest.mark.parametrize(
    ("modules", "costs", "sizes"),
    [
        (_pairs(3), [1, 1, 1, 1, 1, 1], (2, 4)),
        (_pairs(4), [1, 1, 1, 1, 1, 1, 1, 1], (2, 2, 2, 2)),
        ([nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(), nn.Linear(WIDTH, CLASSES)], [1, 1, 1, 1], (3, 1)),
        ([nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)], [1, 9, 1], (2, 1)),  # an expensive ReLU
        ([nn.Flatten(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)], [9, 1, 1, 1], (3, 1)),
        ([nn.Flatten(), nn.Dropout(), nn.Linear(WIDTH, WIDTH)], [1, 1, 1], (3,)),
    ],
    ids=["pairs", "four pairs", "dropout", "expensive", "flatten first", "one stage"],
)
def test_a_layer_without_parameters_stays_with_the_layer_before_it(
    modules: list[nn.Module], costs: list[float], sizes: tuple[int, ...]
) -> None:
    """The cut once fell between a Linear and its ReLU: the DNI learned from what the ReLU was going to cut off."""
    assert balanced_split(layers_of(modules), costs, len(sizes)) == sizes


def test_where_too_few_layers_have_parameters_any_may_begin_a_stage_and_it_is_said() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))

    resolved = _resolve(model, stages=3)
    assert resolved.sizes == (1, 1, 1)
    said = "; the cut is better behind 1 (ReLU), without parameters: a DNI should see what comes out there"
    assert resolved.reasons[1] == ("split", "1 | 1 | 1", "number of layers" + said)
    assert _resolve(model, stages=2, cuts=("1",)).reasons[1] == ("split", "1 | 2", "given" + said)
    assert _resolve(model, stages=2).reasons[1] == ("split", "2 | 1", "number of layers")
    assert _resolve(model, stages=2, balance="layers").reasons[1] == ("split", "2 | 1", "number of layers")


# ---------------------------------------------------------------- what a model may be


class Chain(nn.Module):
    """Children in a row, some of them in a ModuleList: names to cut at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """In the order of registration."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def sequential() -> nn.Sequential:
    """An activation, used twice, that is one object, as many people write it."""
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), relu, nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), relu, nn.Linear(WIDTH, CLASSES)
    )


def named_sequential() -> nn.Sequential:
    """Layers with names of their own."""
    layers = OrderedDict(inner=nn.Linear(WIDTH, WIDTH), act=nn.Tanh(), outer=nn.Linear(WIDTH, CLASSES))
    return nn.Sequential(layers)


def module_list() -> nn.ModuleList:
    """No forward at all."""
    return nn.ModuleList(sequential())


def tied_inside() -> nn.Sequential:
    """Layers 1 and 3 share one weight, and keep a bias each."""
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
    )
    model[3].weight = model[1].weight
    return model


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (sequential, ["0", "1", "2", "3", "4", "5"]),
        (named_sequential, ["inner", "act", "outer"]),
        (module_list, ["0", "1", "2", "3", "4", "5"]),
        (lambda: list(sequential()), ["0", "1", "2", "3", "4", "5"]),
        (Chain, ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]),
    ],
    ids=["Sequential", "named Sequential", "ModuleList", "list", "children"],
)
def test_layers_by_name(model: Callable[[], Any], names: list[str]) -> None:
    assert [layer.name for layer in layers_of(model())] == names
    assert [layer.index for layer in layers_of(model())] == list(range(len(names)))


def nested() -> nn.Sequential:
    """Eight layers in one, and a head."""
    return nn.Sequential(nn.Sequential(*_pairs(4)), nn.Linear(WIDTH, CLASSES))


class Deep(nn.Module):
    """Lists in lists."""

    def __init__(self) -> None:
        super().__init__()
        pair = nn.Sequential(nn.Sequential(*_pairs(2)), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)))
        self.groups = nn.ModuleList([nn.ModuleList([pair, nn.Tanh()]), nn.ModuleList([nn.Linear(WIDTH, CLASSES)])])

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        for group in self.groups:
            for module in group:  # type: ignore[attr-defined]
                x = module(x)
        return x


def test_what_is_nested_is_opened_to_any_depth() -> None:
    """``Sequential(Sequential(8 layers), Linear)`` once had two layers: no four stages could be made of it."""
    names = [*(f"0.{index}" for index in range(8)), "1"]
    assert [layer.name for layer in layers_of(nested())] == names
    assert _resolve(nested, stages=4).sizes == (2, 2, 2, 3)
    deep = ["groups.0.0.0.0", "groups.0.0.0.1", "groups.0.0.0.2", "groups.0.0.0.3", "groups.0.0.1", "groups.0.1"]
    assert [layer.name for layer in layers_of(Deep())] == [*deep, "groups.1.0"]
    assert _resolve(Deep, stages=4).layer_names[-1] == "groups.1.0"


def test_a_linear_with_its_activation_and_its_normalisation_stays_one_layer() -> None:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(2)]
    assert [layer.name for layer in layers_of(nn.Sequential(*blocks))] == ["0", "1"]


def test_a_cut_may_name_what_was_opened() -> None:
    assert _resolve(Deep, stages=3, cuts=("groups.0.0.1", "groups.1")).sizes == (4, 2, 1)
    assert _resolve(Chain, stages=2, cuts=("blocks",)).sizes == (1, 4)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (nested, (3, 6)),
        (Deep, (3, 4)),
        (sequential, (6,)),
        (sequential, (1, 2, 3)),
        (named_sequential, (1, 1, 1)),
        (module_list, (2, 4)),
        (Chain, (1, 2, 2)),
        (tied_inside, (1, 3, 1)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_stages_partition_the_state_of_the_model_exactly(model: Callable[[], Any], sizes: tuple[int, ...]) -> None:
    """Every parameter and buffer belongs to one stage, under the unsplit model's name and with its value."""
    recipe = _recipe(model)
    plan = resolve(recipe, Plan(mode="naive", stages=len(sizes), sizes=sizes)).plan
    parts = [Stage(stage_layers(recipe, plan, k), k, plan, recipe).state_tensors() for k in range(plan.stages)]
    together = {name: tensor.detach() for part in parts for name, tensor in part.items()}
    assert len(together) == sum(map(len, parts)), "no name stands in two stages"
    assert_same(together, dict(build_model(recipe, plan.seed).state_dict()))


def test_cuts_by_name() -> None:
    assert _resolve(Chain, stages=3, cuts=("blocks.1", "head")).sizes == (2, 2, 1)
    assert _resolve(named_sequential, stages=2, cuts=("act",)).sizes == (1, 2)


def test_without_a_clock_layers_count_alike() -> None:
    assert _resolve(Chain, stages=2).sizes == (2, 3)
    assert _resolve(Chain, stages=2, balance="layers").sizes == (2, 3)


def test_measured_layers_decide_the_balance() -> None:
    resolved = resolve(_recipe(Chain), Plan(stages=2), measure=lambda layers, inputs: [1.0, 1.0, 1.0, 1.0, 4.0])
    assert resolved.sizes == (4, 1)
    assert resolved.layer_seconds == (1.0, 1.0, 1.0, 1.0, 4.0)
    assert ("split", "4 | 1", "measured time per layer") in resolved.reasons


def test_a_layer_that_works_in_place_can_be_measured() -> None:
    """The measurement once gave it a view of a leaf, which autograd refuses."""
    layers = layers_of(nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(inplace=True), nn.Linear(4, CLASSES)))
    x = torch.randn(ROWS, WIDTH)
    hidden = torch.randn(ROWS, 4)
    assert all(seconds > 0 for seconds in layer_seconds(layers, [x, hidden, hidden.relu()], threads=1))
    assert bool((hidden < 0).any()), "what is measured with is left as it was"


@pytest.mark.parametrize("model", [module_list, lambda: list(sequential())], ids=["ModuleList", "list"])
def test_a_model_without_a_forward_trains_as_the_chain_of_its_items(model: Callable[[], Any]) -> None:
    plan = Plan(mode="naive", stages=2, sizes=(2, 4), steps=5)
    assert_same(
        run_reference(_recipe(model), plan).state_tensors(), run_reference(_recipe(sequential), plan).state_tensors()
    )


# ---------------------------------------------------------------- where it cannot be split


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (
            {"stages": 6, "balance": "layers"},
            "6 stages for 5 layers: every stage needs a layer; use --stages 5 or fewer.",
        ),
        (
            {"sizes": (1, 2)},
            "sizes 1 2 add up to 3, but the model has 5 layers: stem, blocks.0, blocks.1, blocks.2, head.",
        ),
        (
            {"cuts": ("block.1",)},
            "unknown layer in cuts 'block.1'; did you mean 'blocks.1'? "
            "Valid: stem, blocks.0, blocks.1, blocks.2, head.",
        ),
        (
            {"stages": 3, "cuts": ("head", "blocks.0")},
            "cuts head blocks.0 leave a stage without layers: name layers in order, not the first one.",
        ),
        ({"cuts": ("stem",)}, "cuts stem leave a stage without layers: name layers in order, not the first one."),
    ],
    ids=["too many stages", "sizes", "unknown cut", "order of cuts", "first layer"],
)
def test_a_split_that_does_not_fit_the_model_is_refused(plan: dict[str, Any], sentence: str) -> None:
    assert _refused(Chain, **plan) == sentence


@pytest.mark.parametrize("model", [nn.Sequential, nn.ModuleList, list, nn.ReLU], ids=lambda model: model.__name__)
def test_a_model_without_layers_is_refused(model: Callable[[], Any]) -> None:
    assert _refused(model, stages=1).startswith("the model has no layers to split: give an nn.Sequential")


# ---------------------------------------------------------------- tied weights


def twice() -> nn.Sequential:
    """A layer in two places."""
    layer = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(WIDTH, CLASSES))


def test_weights_tied_across_stages_are_found_by_all_their_names() -> None:
    ties = _resolve(tied_inside, stages=2, sizes=(2, 3)).plan.ties
    assert ties is not None
    assert (ties.stages, ties.names[0]) == ((0, 1), ("1.weight", "3.weight"))
    assert _resolve(twice, stages=2, sizes=(3, 1)).plan.ties is None


@pytest.mark.parametrize("mode", ["naive", "gpipe"])
@pytest.mark.parametrize("model", [tied_inside, twice])
def test_weights_tied_across_stages_train_as_in_one_process(model: Callable[[], nn.Sequential], mode: str) -> None:
    """To the last bit: their gradients are added up before every step, on both sides."""
    sizes = (2, 3) if model is tied_inside else (2, 2)
    plan = Plan(mode=mode, stages=2, sizes=sizes, steps=10)
    alone, _, losses = train_alone(_recipe(model), plan)
    mine = run_reference(_recipe(model), plan)
    assert_same(mine.state_tensors(), dict(alone.state_dict()))
    assert mine.losses == losses


def test_copies_of_tied_weights_are_equal_after_unlocked_training() -> None:
    plan = Plan(stages=2, sizes=(2, 3), steps=12)
    done = run_reference(_recipe(tied_inside), plan).state_tensors()
    assert torch.equal(done["1.weight"], done["3.weight"])


def test_running_means_shared_across_stages_are_refused() -> None:
    def model() -> nn.Sequential:
        norm = nn.BatchNorm1d(WIDTH, affine=False)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, CLASSES))

    assert _refused(model, stages=2, sizes=(3, 2)).startswith("1.running_mean (stage 0) and 3.running_mean (stage 1)")


@pytest.mark.parametrize("sizes", [(5,), (1, 3, 1)], ids=str)
def test_weights_tied_inside_a_stage_train_as_in_one_process(sizes: tuple[int, ...]) -> None:
    plan = Plan(mode="naive", stages=len(sizes), sizes=sizes, steps=10)
    model, optimizer, losses = train_alone(_recipe(tied_inside), plan)
    mine = run_reference(_recipe(tied_inside), plan)
    assert_same(mine.state_tensors(), dict(model.state_dict()))
    assert_same(mine.optimizer_tensors(), optimizer_tensors(model, optimizer))
    assert mine.losses == losses


def test_weights_tied_inside_a_stage_that_stashes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets true, three stages: the middle one runs on copies of its weights. Both uses of the tied one count, in the
    update and in the relay, and it stays one tensor."""
    targets: dict[int, Tensor] = {}
    learn = Stage.learn

    def ones(self: Stage, item: Item) -> Bundle | None:
        return None if self.last else (torch.ones(ROWS, WIDTH),)

    def logged_learn(self: Stage, item: Item, gradient: Bundle) -> Bundle | None:
        targets[self.index] = present(gradient[0]).clone()
        return learn(self, item, gradient)

    monkeypatch.setattr(Stage, "predict", ones)
    monkeypatch.setattr(Stage, "learn", logged_learn)
    recipe, sgd = _recipe(tied_inside), OptimizerPlan(rule="sgd", lr=0.1)
    mine = run_reference(recipe, Plan(stages=3, sizes=(1, 3, 1), steps=1, optimizer=sgd, targets="true"))

    model = build_model(recipe, seed=0)
    assert isinstance(model, nn.Sequential)
    x, labels = _batch(0)
    below = model[:1](x).detach().requires_grad_()
    h = model[1:4](below)
    (update,) = torch.autograd.grad(h.sum(), model[1].weight, retain_graph=True)
    (true,) = torch.autograd.grad(F.cross_entropy(model[4:](h), labels), below)
    after = mine.state_tensors()
    torch.testing.assert_close(after["1.weight"], model[1].weight.detach() - 0.1 * update)
    torch.testing.assert_close(targets[0], true)
    middle = mine.stages[1].layers
    assert middle[0].module.weight is middle[2].module.weight
    assert torch.equal(after["1.weight"], after["3.weight"])


# ---------------------------------------------------------------- layers that would be lost, or that are no chain


class Scaled(Chain):
    """Has a parameter of its own beside its children."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))


class Doubled(Chain):
    """Does something between its children."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice what the chain gives."""
        return 2 * super().forward(x)


class Flattening(nn.Sequential):
    """The popular short cut: a Sequential with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the inputs first."""
        result: Tensor = super().forward(2 * x)
        return result


@pytest.mark.parametrize(
    ("modules", "normalised"),
    [
        ([nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()], True),
        ([nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.GELU())), nn.Dropout(0.1)], True),
        ([nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()], True),
        ([nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()], False),
        ([nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU()], False),
        ([nn.BatchNorm1d(4), nn.PReLU()], False),
        ([nn.LayerNorm(4), nn.MultiheadAttention(4, 1)], False),
        ([nn.ReLU()], False),
        ([_Residual()], False),
        ([], False),
    ],
)
def test_whether_layers_end_in_a_normalisation(modules: list[nn.Module], normalised: bool) -> None:
    """It may stand in another layer than the last; what a module of the user's does is not known."""
    assert ends_normalised(layers_of(modules) if modules else []) is normalised


def test_a_cut_knows_whether_its_stage_normalises() -> None:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.ReLU()) for norm in (nn.BatchNorm1d(WIDTH), nn.Tanh())]
    resolved = _resolve(lambda: [*blocks, nn.Linear(WIDTH, CLASSES)], stages=3, sizes=(1, 1, 1), mode="unlocked")
    assert [cut.normalised for cut in resolved.cuts] == [True, False]


@pytest.mark.parametrize(("sizes", "said"), [((3, 1), [("softened", "by 2")]), ((2, 2), [])], ids=str)
def test_the_dni_of_a_stage_with_two_weight_matrices_is_softened_and_it_is_said(
    sizes: tuple[int, ...], said: list[tuple[str, str]]
) -> None:
    """An activation function is a layer too, and does not count."""
    chain = [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)]
    reasons = _resolve(partial(list, chain), stages=2, sizes=sizes).reasons
    assert [reason[:2] for reason in reasons if reason[0] == "softened"] == said


def test_a_temperature_that_is_given_is_that_of_all_cuts_and_said() -> None:
    chain = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)]
    reasons = _resolve(partial(list, chain), stages=3, dni=DNIPlan(temperature=3.0)).reasons
    (said,) = (reason[1:] for reason in reasons if reason[0] == "softened")
    assert said == ("by 3", "the DNI's temperature at all cuts: a softer loss teaches sooner")


@pytest.mark.parametrize(
    ("modules", "depth"),
    [
        ([nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)], 2),
        ([nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm([4, 5, 5]))], 1),
        ([nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))], 1),
        ([nn.Linear(4, 3).requires_grad_(False), nn.Embedding(5, 4)], 1),
        ([nn.Linear(4, 1), nn.PReLU(4)], 0),
    ],
    ids=["two", "one and norms", "weight norm", "frozen", "vectors"],
)
def test_how_deep_a_stage_is(modules: list[nn.Module], depth: int) -> None:
    """What counts is what is learned and is a matrix or a kernel."""
    assert depth_of(layers_of(modules)) == depth


def test_a_temperature_for_a_loss_that_is_not_softened_is_refused() -> None:
    recipe = _recipe(
        lambda: [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)], loss=lambda o, y: F.cross_entropy(o, y)
    )
    as_it_is = resolve(recipe, Plan(stages=2, dni=DNIPlan(temperature=1.0)))
    assert not [reason for reason in as_it_is.reasons if reason[0] == "softened"]
    with pytest.raises(PlanError, match=r"dni\.temperature has no effect with this loss"):
        resolve(recipe, Plan(stages=2, dni=DNIPlan(temperature=2.0)))


def test_a_parameter_outside_every_layer_would_be_lost() -> None:
    sentence = "scale, offset belong to no layer and would be lost: move them into one of the layers."
    assert _refused(Scaled, stages=2) == sentence


def test_a_forward_that_is_not_the_chain_is_refused() -> None:
    assert _refused(Doubled, stages=2) == (
        "Doubled.forward does not compute the chain of its children (stem, blocks.0, blocks.1, blocks.2, head): "
        "put everything its forward does into layers, in order."
    )


def test_a_sequential_with_a_forward_of_its_own_is_checked_too() -> None:
    """It once passed as a plain nn.Sequential, and trained without what its forward adds."""

    def model() -> nn.Sequential:
        return Flattening(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))

    assert _refused(model, stages=2).startswith("Flattening.forward does not compute the chain of its children (0, 1)")


def test_a_module_that_stands_in_two_places_runs_in_both() -> None:
    """One nn.ReLU object in two places once lost the second: ``named_children`` gives every object once."""
    plan = Plan(mode="naive", stages=3, sizes=(2, 2, 2), steps=5)
    model, _, losses = train_alone(_recipe(sequential), plan)
    mine = run_reference(_recipe(sequential), plan)
    assert_same(mine.state_tensors(), dict(model.state_dict()))
    assert mine.losses == losses


class InPlace(nn.Module):
    """Writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice as much."""
        return x.mul_(2)


def test_the_check_leaves_the_users_batch_as_it_is() -> None:
    """A first layer that works in place once doubled batch 0 before the training had begun."""
    batches = [_batch(0)]
    before = batches[0][0].clone()
    recipe = _recipe(lambda: nn.Sequential(InPlace(), nn.Linear(WIDTH, CLASSES)), batches=batches)
    resolve(recipe, Plan(stages=2, sizes=(1, 1)))
    assert torch.equal(batches[0][0], before)


def test_a_layer_that_does_not_take_the_tuple_before_it_is_refused_by_name() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))

    refusal = _refused(model, stages=2)
    assert refusal.startswith("layer 2 cannot take what the layer before it gives, [8, 6] torch.float32, [1, 6] ")


def test_a_layer_that_does_not_fit_the_one_before_is_named_with_shapes() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(WIDTH, CLASSES))

    assert _refused(model, stages=2).startswith(
        "layer 1 cannot take what the layer before it gives, [8, 4] torch.float32: "
    )


# ---------------------------------------------------------------- what can cross a cut


def _tokens(index: int) -> Batch:
    codes = torch.randint(CLASSES, (ROWS, 4), generator=torch.Generator().manual_seed(index))
    return codes, codes


def _reader() -> nn.Sequential:
    return nn.Sequential(nn.Identity(), nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, CLASSES))


def _token_loss(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), labels.flatten())


def test_no_cut_where_no_gradient_can_cross() -> None:
    recipe = _recipe(_reader, batches=_tokens, loss=_token_loss)
    with pytest.raises(PlanError) as caught:
        resolve(recipe, Plan(stages=2, sizes=(1, 2)))
    assert str(caught.value) == (
        "layer 0 gives torch.int64, and no gradient can cross a cut behind it: cut elsewhere (--sizes or --cuts)."
    )
    assert len(run_reference(recipe, Plan(stages=2, sizes=(2, 1), steps=3)).losses) == 3
