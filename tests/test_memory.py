"""What a stage keeps of a batch in flight: under `bootstrap` the activation it sent and the labels, and nothing else.

A batch is in flight from its update until its target comes back. It is opened here (forward, predict, backward, step)
and never learned from; what then stays alive is weighed in two ways that know nothing of each other:

    reachable   walk from the stage through everything it refers to, and add up the storages of the tensors found
    allocated   note every storage that any operator gave out, weakly; add up those that are still there (this also
                sees what only a graph of autograd keeps)
"""

from __future__ import annotations

import dataclasses
import gc
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import problems
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import DNIPlan, Plan, Recipe
from pipeline.data.network import stage_layers
from pipeline.messages.bundle import Item
from pipeline.model.partition import layers_of
from pipeline.run.resolve import resolve
from pipeline.stage.stage import Stage

WIDTH, ROWS, BATCHES = 96, 64, 8
ACTIVATION = ROWS * WIDTH * 4  # bytes
LABELS = ROWS * 8
WEIGHTS = 2 * (WIDTH * WIDTH + WIDTH) * 4  # of a stage with two linear layers


def six_layers() -> nn.Sequential:
    """Three stages of two linear layers with a ReLU between them."""
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, problems.CLASSES))


def everything() -> nn.Sequential:
    """BatchNorm, dropout, and layers that write to their input."""
    block = (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True), nn.Dropout(0.2))
    return nn.Sequential(nn.Sequential(*block), six_layers()[0], nn.Linear(WIDTH, problems.CLASSES))


def _batch(index: int) -> tuple[Tensor, Tensor]:
    return problems.batch(index, WIDTH, ROWS)


def _stage(index: int, model: Callable[[], nn.Sequential] = six_layers, **plan: Any) -> Stage:
    """A stage of three whose optimizer and DNI have seen a batch already, so that their own states are there."""
    recipe = Recipe(name="memory", model=model, batches=_batch, loss=F.cross_entropy, steps=20)
    plan.setdefault("dni", DNIPlan(every=1))
    blocks = Counter(layer.name.split(".")[0] for layer in layers_of(model()))
    resolved = resolve(recipe, Plan(stages=3, sizes=tuple(blocks.values()), **plan))
    cut = replace(resolved.cuts[index], loss=recipe.loss)
    stage = Stage(stage_layers(recipe, resolved.plan, index), index, resolved.plan, recipe, cut)
    _open(stage, 0)
    stage.learn(Item(0), (torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)),))
    _open(stage, 1)
    return stage


def _open(stage: Stage, batch: int) -> None:
    """A batch that has been updated from; its tensors are the stage's alone, as those of a message are."""
    x, labels = _batch(batch)
    stage.forward(Item(batch), (x,), (labels,))
    stage.backward(Item(batch), stage.predict(Item(batch)))
    stage.step(batch)


@pytest.fixture(autouse=True)
def only_new_garbage() -> Iterator[None]:
    """What was there before the test is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Allocated(TorchDispatchMode):
    """Knows every storage that an operator has given out, and which of them are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, note what came out."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive_bytes(self) -> int:
        """Bytes of those that are still there."""
        gc.collect()
        return sum(num_bytes for reference, num_bytes in self._seen.values() if not reference.expired())


def _reachable_bytes(root: object) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _tensors(root)}
    return sum(storages.values())


def _tensors(root: object) -> Iterator[Tensor]:
    """Every tensor that can be reached through attributes, slots, mappings and sequences; gradients too."""
    seen: set[int] = set()
    left = [root]
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType | types.FunctionType | str | bytes):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
            left.append(thing.grad if thing.is_leaf else None)
        elif isinstance(thing, dict):
            left += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset):
            left += thing
        else:
            names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
            left += [getattr(thing, name, None) for name in names if name != "__weakref__"]
            left += getattr(thing, "__dict__", {}).values()


def _growth(stage_of: Callable[[], Stage]) -> tuple[list[int], list[int]]:
    """Bytes that each further open batch adds, by both ways of weighing."""
    with Allocated() as allocated:
        stage = stage_of()
        before = _reachable_bytes(stage), allocated.alive_bytes()
        reachable, alive = [before[0]], [before[1]]
        for batch in range(2, 2 + BATCHES):
            _open(stage, batch)
            reachable.append(_reachable_bytes(stage))
            alive.append(allocated.alive_bytes())
    return _differences(reachable), _differences(alive)


def _differences(values: list[int]) -> list[int]:
    return [after - before for before, after in pairwise(values)]


@pytest.mark.parametrize("form", ["label_residual", "loss_model", "mlp"])
@pytest.mark.parametrize("model", [six_layers, everything])
@pytest.mark.parametrize("index", [0, 1])
def test_a_batch_in_flight_keeps_its_activation_and_its_labels_and_not_a_byte_more(
    index: int, model: Callable[[], nn.Sequential], form: str
) -> None:
    """`bootstrap`: no graph, no input, no copy of the weights, in a first stage and in one between others."""
    reachable, allocated = _growth(lambda: _stage(index, model, dni=DNIPlan(form=form, every=1)))
    assert reachable == [ACTIVATION + LABELS] * BATCHES
    assert allocated == [ACTIVATION + LABELS] * BATCHES


@pytest.mark.parametrize(("targets", "synthetic"), [("true", 1), ("mixed", 1)])
def test_a_relay_keeps_its_graph_and_a_copy_of_the_weights(targets: str, synthetic: int) -> None:
    """The price of the other targets in a stage between others: the input, what its one ReLU gave, the output, the
    synthetic gradient, the labels, and the weights that made them."""
    reachable, allocated = _growth(lambda: _stage(1, targets=targets))
    tensors = (3 + synthetic) * ACTIVATION + LABELS
    assert allocated == [tensors + WEIGHTS] * BATCHES
    assert reachable == [tensors - ACTIVATION + WEIGHTS] * BATCHES, "what the ReLU gave hangs on the graph alone"


def test_a_first_stage_never_relays_and_keeps_no_more_for_true_targets() -> None:
    reachable, allocated = _growth(lambda: _stage(0, targets="true"))
    assert reachable == allocated == [ACTIVATION + LABELS] * BATCHES


@pytest.mark.parametrize("targets", ["bootstrap", "true", "mixed"])
def test_a_target_gives_back_what_its_batch_kept(targets: str) -> None:
    with Allocated() as allocated:
        stage = _stage(1, targets=targets)
        before = allocated.alive_bytes()
        for batch in range(2, 6):
            _open(stage, batch)
        for batch in range(1, 6):
            stage.learn(Item(batch), (torch.ones(ROWS, WIDTH),))
        after = allocated.alive_bytes()
    kept_of_batch_1 = before - after
    assert kept_of_batch_1 >= ACTIVATION + LABELS, "and of batches 2 to 5 nothing is left"


def test_a_batch_without_a_target_keeps_nothing() -> None:
    """``dni.every``: batch 2 of 4 brings none."""
    with Allocated() as allocated:
        stage = _stage(1, targets="true", dni=DNIPlan(every=4))
        before = allocated.alive_bytes()
        _open(stage, 2)
        assert allocated.alive_bytes() == before


def test_the_scales_see_what_is_kept() -> None:
    """A tensor that only a graph keeps, one in a slot, and one that two names share."""

    @dataclasses.dataclass(slots=True)
    class Keeps:
        first: Tensor
        second: Tensor

    with Allocated() as allocated:
        weight = torch.ones(10, requires_grad=True)
        before = allocated.alive_bytes()
        output = (torch.ones(10) * 2 * weight).sum()  # the product keeps its left side
        assert allocated.alive_bytes() == before + 40 + 4
        kept = Keeps(torch.zeros(3), torch.zeros(5))
        kept.second = kept.first[1:]
        assert _reachable_bytes([kept, {"again": kept.first}]) == 12
        assert _reachable_bytes(output) == 4
        del output, kept
        assert allocated.alive_bytes() == before
