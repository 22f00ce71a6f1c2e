"""Data and recipes: a batch that cannot be trained on is refused early, and every recipe gives what it promises."""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from launch import train
from launch.recipes import BUILT_IN
from launch.recipes.chargpt import chargpt
from launch.recipes.digits import _table, digits
from launch.recipes.mlp import mlp
from launch.recipes.mnist import mnist
from launch.setup.recipe_source import GivenRecipe, NamedRecipe, check_travels, entry_of
from launch.setup.resolve_source import resolve_source
from pipeline import (
    ArrayBatches,
    Batch,
    DNIPlan,
    OptimizerPlan,
    Plan,
    PlanError,
    Recipe,
    correct_predictions,
    run_reference,
)
from pipeline.data.recipe import build_model, check_scores, label_problem
from pipeline.plan.check import check_plan
from pipeline.run.resolve import resolve
from pipeline.stage.evaluation import EvaluationMetrics

WIDTH, CLASSES, ROWS = 6, 3, 8


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))


def _batch(index: int, rows: int = ROWS) -> Batch:
    inputs = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(index))
    return inputs, inputs[:, :CLASSES].argmax(1)


def _recipe(**parts: Any) -> Recipe:
    return Recipe(**{"name": "small", "model": _model, "batches": _batch, "loss": F.cross_entropy, **parts})


def _refused(plan: Plan | None = None, **parts: Any) -> str:
    with pytest.raises(PlanError) as caught:
        resolve(_recipe(**parts), plan or Plan(steps=6))
    (problem,) = caught.value.problems
    return problem


# ---------------------------------------------------------------- batches


def test_a_batch_of_a_list_that_is_smaller_than_the_rest() -> None:
    batches = [_batch(0), _batch(1), _batch(2), _batch(3, rows=5)]
    assert _refused(batches=batches) == (
        "batch 3 has inputs [5, 6] torch.float32, batch 0 has [8, 6] torch.float32: all training batches must be "
        "alike; drop or fill up the smaller one."
    )


@pytest.mark.parametrize("small", [1, 5])
def test_a_smaller_batch_of_a_function_at_the_places_that_are_looked_at(small: int) -> None:
    """The first, the second and the last are looked at before the run."""
    sentence = _refused(batches=lambda index: _batch(index, rows=5 if index == small else ROWS))
    assert sentence.startswith(f"batch {small} has inputs [5, 6]")


def test_a_smaller_batch_in_the_middle_of_the_run_is_named_when_it_comes() -> None:
    recipe = _recipe(batches=lambda index: _batch(index, rows=5 if index == 3 else ROWS))
    with pytest.raises(PlanError, match="batch 3 has inputs \\[5, 6\\]"):
        run_reference(recipe, Plan(steps=6))


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([], "batches is empty: give at least one (inputs, labels)."),
        (
            lambda index: "nothing",
            "batch 0 is a str: give tensors or arrays, as (inputs, labels), as a dict of the "
            "model's arguments, or the inputs alone.",
        ),
        (
            lambda index: _batch(index)[0],
            "the loss does not take output [8, 3] torch.float32 and labels, which are the inputs "
            "as the batch has no others, [8, 6] torch.float32: give labels of the shape it needs (0D or 1D target "
            "tensor expected, multi-target not supported).",
        ),
        (
            lambda index: (*_batch(index), 3),
            "layer 0 cannot take the inputs, [8, 6] torch.float32, [8] torch.int64: linear(): argument 'input' "
            "(position 1) must be Tensor, not tuple",
        ),
        (
            lambda index: (np.zeros((8, 6)), [1] * 8),
            "layer 0 cannot take the inputs, [8, 6] torch.float64: mat1 and mat2 must have the same dtype, but got "
            "Double and Float",
        ),
        (
            lambda index: _batch(index, rows=0),
            "batch 0 has inputs [0, 6] and labels [0]: both need the same, non-zero number of rows.",
        ),
        (
            lambda index: (_batch(index)[0], _batch(index)[1][:5]),
            "batch 0 has inputs [8, 6] and labels [5]: both need the same, non-zero number of rows.",
        ),
        (
            lambda index: (torch.tensor(1.0), torch.tensor(1)),
            "batch 0 has inputs [] and labels []: both need the same, non-zero number of rows.",
        ),
        (
            [_batch(0), (_batch(1)[0].double(), _batch(1)[1])],
            "batch 1 has inputs [8, 6] torch.float64, batch 0 has [8, 6] torch.float32: all training batches must be "
            "alike; drop or fill up the smaller one.",
        ),
    ],
    ids=["no batch", "text", "no labels", "three parts", "doubles", "no rows", "fewer labels", "0-dim", "dtype"],
)
def test_what_is_no_batch_is_refused(batches: Any, sentence: str) -> None:
    assert _refused(batches=batches) == sentence


def _loader(rows: int = 32, **options: Any) -> DataLoader[Any]:
    x, y = zip(*(_batch(index) for index in range(rows // ROWS)), strict=True)
    return DataLoader(TensorDataset(torch.cat(x), torch.cat(y)), batch_size=ROWS, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_is_read_in_order_and_shuffled_by_seed_and_epoch(workers: int) -> None:
    """Read twice it gives the same, whoever reads it, and other orders in other epochs and for other seeds."""
    recipe = _recipe(batches=_loader(shuffle=True, num_workers=workers))
    first = [recipe.seeded_batch(5, index).inputs for index in range(9)]
    torch.manual_seed(1)
    assert all(torch.equal(recipe.seeded_batch(5, index).inputs, first[index]) for index in range(9))
    assert {row.sum().item() for row in torch.cat(first[:4])} == {row.sum().item() for row in torch.cat(first[4:8])}
    assert not torch.equal(torch.cat(first[:4]), torch.cat(first[4:8]))
    assert not torch.equal(recipe.seeded_batch(6, 0).inputs, first[0])
    own = _recipe(batches=_loader(shuffle=True, num_workers=workers, generator=torch.Generator()))
    assert torch.equal(own.seeded_batch(5, 3).inputs, own.seeded_batch(5, 3).inputs)


def test_a_data_loader_trains_as_its_batches_in_a_list() -> None:
    plan = Plan(mode="naive", steps=6)
    loaded = run_reference(_recipe(batches=_loader(), evaluation=_loader()), plan)
    listed = run_reference(_recipe(batches=list(_loader()), evaluation=list(_loader())), plan)
    assert loaded.losses == listed.losses
    assert loaded.scores == listed.scores


def test_what_cannot_be_iterated_again_is_refused() -> None:
    assert _refused(batches=iter([_batch(0)])).startswith("batches is a list_iterator: give a function of the batch's")
    dataset = TensorDataset(*_batch(0))
    assert _refused(batches=dataset).startswith("batches is a TensorDataset, whose items are single samples: give a")


def test_batches_of_a_list_come_again_and_again() -> None:
    recipe = _recipe(batches=[_batch(0), _batch(1)])
    assert recipe.batch(5).inputs is recipe.batch(1).inputs


def test_a_list_of_many_batches_can_travel_to_the_workers() -> None:
    """128 batches are 256 file descriptors, one more than a fork server takes: "ValueError: too many fds"."""
    batches = [_batch(index) for index in range(2)]
    ForkingPickler.dumps(GivenRecipe(_recipe(batches=batches)))  # as a process is told what to run
    resource_sharer.stop(timeout=5)
    assert not any(tensor.is_shared() for batch in batches for tensor in batch)


@pytest.mark.processes
def test_training_on_a_list_of_700_batches(tmp_path: Path) -> None:
    """It trains on the same numbers as a function that gives the same batches."""

    def run(batches: Any) -> list[float]:
        plan = Plan(stages=2, mode="naive", sizes=(4, 4), steps=12)
        return train(
            model=problems.dropout_and_batch_norm,
            batches=batches,
            loss=F.cross_entropy,
            plan=plan,
            runs=tmp_path,
            quiet=True,
        ).losses

    assert run([problems.batch(index) for index in range(700)]) == run(problems.batch)


def test_a_list_arrives_as_it_was() -> None:
    """Batches may be views of one tensor, in any memory layout, and the labels the inputs themselves."""
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    batches = [(part.T, part.T) for part in rows.split(4)] + [(rows[:4], rows[:4].bool())]
    make, parts = GivenRecipe(_recipe(batches=batches)).__reduce__()
    arrived = make(*parts)()
    assert arrived.loss is F.cross_entropy
    for mine, truth in zip(arrived.batches, batches, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine, truth, strict=True))


def test_a_model_in_the_place_of_the_function_that_builds_it() -> None:
    with pytest.raises(PlanError, match="model is a Sequential: give the function that builds it"):
        resolve_source(GivenRecipe(_recipe(model=_model())), Plan(steps=6))


def test_a_delay_of_the_reference_driver_is_refused_in_processes() -> None:
    """Only a run that follows the reference driver's order knows its delays."""
    source = GivenRecipe(_recipe())
    with pytest.raises(PlanError, match="hop_steps has no effect in processes without deterministic"):
        resolve_source(source, Plan(steps=6, hop_steps=1.0))
    resolve_source(source, Plan(steps=6, hop_steps=1.0, deterministic=True))
    run_reference(source.recipe, Plan(steps=6, hop_steps=1.0))


# ---------------------------------------------------------------- labels and loss


def test_cross_entropy_with_labels_of_another_shape() -> None:
    sentence = _refused(batches=lambda index: (_batch(index)[0], torch.zeros(ROWS, 2, dtype=torch.int64)))
    assert sentence.startswith(
        "the loss does not take output [8, 3] torch.float32 and labels [8, 2] torch.int64: give labels of the shape it "
        "needs ("
    )


def test_mean_squared_error_that_would_broadcast() -> None:
    """torch only warns, and trains on nonsense: [8, 3] against [8, 1] ... or, worse, [8] against [8, 1]."""
    sentence = _refused(loss=F.mse_loss, batches=lambda index: (_batch(index)[0], torch.zeros(ROWS, 1)))
    assert sentence.startswith("the loss does not take output [8, 3] torch.float32 and labels [8, 1] torch.float32: ")
    sentence = _refused(
        loss=F.mse_loss,
        model=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)),
        batches=lambda index: (_batch(index)[0], torch.zeros(ROWS)),
    )
    assert sentence.startswith("the loss does not take output [8, 1] torch.float32 and labels [8] torch.float32: ")


def test_regression_with_labels_of_the_right_shape_trains() -> None:
    def batch(index: int) -> Batch:
        inputs, _ = _batch(index)
        return inputs, inputs[:, :CLASSES] * 2

    plan = Plan(steps=100, stages=2, sizes=(1, 2), optimizer=OptimizerPlan(lr=0.02))
    losses = run_reference(_recipe(loss=F.mse_loss, batches=batch), plan).losses
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


# ---------------------------------------------------------------- options that nothing reads


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (
            Plan(dni=DNIPlan(form="linear", hidden=64)),
            "dni.hidden has no effect with the DNI form linear: leave it out, or choose mlp or conv or loss_model.",
        ),
        (
            Plan(mode="local", dni=DNIPlan(rows=0.5)),
            "dni.rows has no effect with mode local: leave it out, or choose mode unlocked.",
        ),
        (
            Plan(mode="local", dni=DNIPlan(form="mlp")),
            "dni.form has no effect with mode local: leave it out, or choose mode unlocked.",
        ),
    ],
    ids=["hidden", "local rows", "local form"],
)
def test_an_option_that_no_dni_reads_is_refused(plan: Plan, sentence: str) -> None:
    assert _refused(plan) == sentence


@pytest.mark.parametrize(
    "plan",
    [
        Plan(dni=DNIPlan(form="mlp", hidden=64)),
        Plan(dni=DNIPlan(hidden=64)),
        Plan(mode="local", dni=DNIPlan(hidden=64, lr=0.1)),
        Plan(stages=1, dni=DNIPlan(hidden=64)),
    ],
    ids=["mlp", "loss_model", "local", "one stage"],
)
def test_an_option_that_a_dni_reads_is_taken(plan: Plan) -> None:
    resolve(_recipe(), plan)


def test_two_options_that_no_dni_reads_come_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        resolve(_recipe(), Plan(mode="local", dni=DNIPlan(form="linear", rows=0.5)))
    assert len(caught.value.problems) == 2


# ---------------------------------------------------------------- held-out data


@pytest.mark.parametrize(
    "held_out",
    [
        (torch.zeros(ROWS + 1, WIDTH), torch.zeros(ROWS + 1, dtype=torch.int64)),
        (torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(ROWS, WIDTH + 1), torch.zeros(ROWS, dtype=torch.int64)),
        (torch.zeros(ROWS, WIDTH), torch.zeros(ROWS - 1, dtype=torch.int64)),
        (torch.zeros(ROWS, WIDTH, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.int64)),
        (torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, CLASSES)),
    ],
    ids=["too many rows", "no row", "wider", "fewer labels", "dtype", "larger labels"],
)
def test_held_out_batches_have_to_fit_into_the_channels(held_out: Batch) -> None:
    """Seen before the run: evaluation comes at its end, when much work would be lost."""
    inputs, labels = held_out
    assert _refused(evaluation=lambda: [_batch(0), held_out]) == (
        f"evaluation batch 1 has inputs {list(inputs.shape)} {inputs.dtype} and labels {list(labels.shape)} "
        f"{labels.dtype}: it needs 1 to 8 rows, the inputs as in training, [8, 6] torch.float32, the labels no larger, "
        "[8] torch.int64."
    )


def test_evaluating_without_held_out_data_is_refused() -> None:
    sentence = "evaluate_every has no effect without held-out batches: leave it out, or give evaluation."
    assert _refused(Plan(steps=6, evaluate_every=2)) == sentence


@pytest.mark.parametrize("plan", [Plan(steps=6), Plan(steps=6, until="loss=1"), Plan(steps=6, evaluate_every=2)])
def test_an_evaluation_without_a_batch_is_refused(plan: Plan) -> None:
    """It once ended as "held-out loss 0.0000", the best there can be."""
    sentence = "evaluation() gives no batch: give held-out batches (inputs, labels), or leave evaluation out."
    assert _refused(plan, evaluation=list) == sentence


_OUTPUT, _LABELS = torch.rand(9, CLASSES, generator=torch.Generator().manual_seed(0)), torch.arange(9) % CLASSES


def test_a_loss_that_is_a_sum_over_the_rows_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        check_scores(_recipe(loss=partial(F.cross_entropy, reduction="sum")), _OUTPUT, _LABELS)
    whole = F.cross_entropy(_OUTPUT[:8], _LABELS[:8], reduction="sum")
    assert str(caught.value) == (
        f"the loss of 8 rows is the sum of the losses of its halves, {whole:.4g}: give the mean over the rows, as "
        "reduction='mean' does, or divide by len(labels)."
    )


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        partial(F.cross_entropy, ignore_index=0),
        partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 50.0])),
        lambda output, labels: F.cross_entropy(output, labels).sqrt(),
        lambda output, labels: output.sum() * 0,
        lambda output, labels: F.cross_entropy(output, labels) if len(labels) == 9 else 1 / 0,
    ],
    ids=["mean", "ignores", "weighs", "no mean", "nothing", "whole batches only"],
)
def test_a_loss_that_is_no_sum_is_taken(loss: Callable[..., Any]) -> None:
    check_scores(_recipe(loss=loss), _OUTPUT, _LABELS)


@pytest.mark.parametrize(
    ("correct", "sentence"),
    [
        (
            lambda output, labels: (output.argmax(1) == labels).sum(),
            "correct() gives a Tensor: give a pair, the number",
        ),
        (lambda output, labels: (output, 3), "correct() gives a tuple: give a pair, the number of right answers and "),
        (lambda output, labels: output.nothing, "correct() raises AttributeError: 'Tensor' object has no attribute "),
    ],
    ids=["one number", "no number", "raises"],
)
def test_what_counts_right_answers_is_tried_before_the_run(correct: Callable[..., Any], sentence: str) -> None:
    """It was found after all the training."""
    with pytest.raises(PlanError) as caught:
        check_scores(_recipe(correct=correct), _OUTPUT, _LABELS)
    assert str(caught.value).startswith(sentence)
    plan = Plan(steps=2, stages=1)
    source = GivenRecipe(replace(problems.two_linear_recipe(), correct=problems.counts_badly))
    with pytest.raises(PlanError, match=r"^correct\(\) gives a Tensor"):
        resolve_source(source, plan)


@pytest.mark.parametrize(
    ("labels", "output_shape", "label"),
    [
        ([0, 3, 4], (3, 4), 4),
        ([0, -1, 3], (3, 4), -1),
        ([0, -100, 3], (3, 4), None),
        ([[0, 7], [1, 2]], (2, 2, 7), 7),
        ([[0, 7], [1, 2]], (2, 7, 2), 7),
        ([[0, 7], [1, 2]], (2, 5), None),
        ([0.0, 9.0], (2, 4), None),
        ([9, 9], (2,), None),
    ],
    ids=[
        "too large",
        "negative",
        "left out",
        "classes last",
        "classes second",
        "no classes",
        "regression",
        "no column",
    ],
)
def test_a_label_without_a_class_is_named(labels: Any, output_shape: tuple[int, ...], label: int | None) -> None:
    problem = label_problem(torch.tensor(labels), output_shape)
    assert (problem is None) == (label is None)
    classes = max(output_shape[1:], default=0)
    assert problem is None or problem.startswith(
        f"label {label} is out of range, as the network's output has {classes} classes, 0 to {classes - 1}: mend the "
    )


def test_a_label_out_of_range_in_batch_0_is_told_as_that() -> None:
    """It was a loss that wants labels of another shape, with the right one."""
    source = GivenRecipe(replace(problems.two_linear_recipe(), batches=[problems.batches_with_a_wrong_label(7)]))
    with pytest.raises(PlanError) as caught:
        resolve_source(source, Plan(steps=2, stages=1))
    assert str(caught.value) == (
        "batch 0: label 9 is out of range, as the network's output has 5 classes, 0 to 4: mend the labels, or give the "
        "last layer more outputs."
    )


def test_no_rows_have_no_loss() -> None:
    assert math.isnan(EvaluationMetrics().loss())
    assert EvaluationMetrics().accuracy() is None


def test_the_score_is_the_mean_over_the_rows_of_all_held_out_batches() -> None:
    """The last batch may be smaller, and counts less."""
    held_out = [_batch(100), _batch(101, rows=3)]
    recipe = _recipe(evaluation=lambda: held_out, correct=correct_predictions)
    result = run_reference(recipe, Plan(steps=4, stages=2, sizes=(1, 2)))
    model = build_model(recipe, seed=0)
    model.load_state_dict(result.state_tensors())
    inputs, labels = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    with torch.no_grad():
        output = model(inputs)
    ((updates, scores),) = result.scores
    assert updates == 4
    assert scores.loss() == pytest.approx(F.cross_entropy(output, labels).item(), rel=1e-5)
    assert scores.accuracy() == pytest.approx((output.argmax(1) == labels).float().mean().item())


def test_a_first_layer_that_works_in_place_leaves_the_data_alone() -> None:
    """Evaluation once wrote its activations over the held-out rows, so that every pass saw other ones."""
    data = [_batch(0), _batch(1)]
    before = [inputs.clone() for inputs, _ in data]
    recipe = _recipe(
        model=lambda: nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(WIDTH, CLASSES)),
        batches=data,
        evaluation=lambda: data,
    )
    run_reference(recipe, Plan(stages=2, sizes=(1, 1), steps=4, evaluate_every=1))
    assert all(torch.equal(inputs, truth) for (inputs, _), truth in zip(data, before, strict=True))


# ---------------------------------------------------------------- ArrayBatches


def _numbered(rows: int, batch_size: int, seed: int = 0) -> ArrayBatches:
    """Row i is the number i, and so is its label."""
    numbers = torch.arange(rows)
    return ArrayBatches(numbers.float().unsqueeze(1), numbers, batch_size, seed)


def _order(batches: ArrayBatches, epoch: int) -> list[int]:
    per_epoch = len(batches.inputs) // batches.batch_size
    labels = [batches(index)[1] for index in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
    return torch.cat(labels).tolist()


def test_every_epoch_is_another_permutation() -> None:
    batches = _numbered(rows=24, batch_size=4)
    epochs = [_order(batches, epoch) for epoch in range(5)]
    assert all(sorted(order) == list(range(24)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 5


def test_what_is_left_over_is_another_part_every_epoch() -> None:
    batches = _numbered(rows=10, batch_size=4)
    epochs = [_order(batches, epoch) for epoch in range(20)]
    assert all(len(set(order)) == 8 for order in epochs), "no row twice in an epoch"
    assert set().union(*epochs) == set(range(10))


def test_batch_i_is_a_function_of_seed_and_i() -> None:
    """In any order, of any object, whatever the global generator was before."""
    first = [_numbered(24, 4, seed=3)(index) for index in range(12)]
    again = _numbered(24, 4, seed=3)
    torch.manual_seed(99)
    for index in reversed(range(12)):
        inputs, labels = again(index)
        assert torch.equal(inputs, first[index][0])
        assert torch.equal(labels, first[index][1])
        assert torch.equal(inputs.squeeze(1).long(), labels), "inputs and labels belong together"
    assert _order(_numbered(24, 4, seed=4), 0) != _order(again, 0)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_batch_is_not_larger_than_the_data(size: int) -> None:
    with pytest.raises(PlanError, match=f"batch is {size}: give 1 to 10, the rows of the data."):
        _numbered(rows=10, batch_size=size)


@pytest.mark.parametrize("labels", [9, 12])
def test_every_row_has_a_label(labels: int) -> None:
    """Too many labels once passed: whoever mixed up two files trained on shifted labels."""
    with pytest.raises(PlanError, match=f"10 rows of inputs and {labels} of labels: give a label for every row."):
        ArrayBatches(torch.zeros(10, 2), torch.zeros(labels), 5)


# ---------------------------------------------------------------- digits and mlp


def _held_out(recipe: Recipe) -> Iterable[Batch]:
    assert recipe.evaluation is not None
    return recipe.evaluation()


def _rows(batches: Iterable[Batch]) -> set[tuple[float, ...]]:
    return {tuple(row) for inputs, _ in batches for row in inputs.tolist()}


def test_digits_are_those_that_scikit_learn_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read without the package, which is slow to import; where its file is not, the package loads them."""
    rows = _table()
    loaded = load_digits()
    assert np.array_equal(rows, np.column_stack([loaded.data, loaded.target]))
    elsewhere = SimpleNamespace(origin="/nowhere/sklearn/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: elsewhere)
    assert np.array_equal(rows, _table())


def test_without_scikit_learn_digits_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(PlanError, match=r"scikit-learn, which is not installed: pip install 'freewheel\[digits\]'"):
        _table()


def test_digits_are_split_once_and_for_all() -> None:
    """Three quarters to train, the rest held out: together all 1,797, none in both, whatever the seed."""
    recipe, other = digits(batch=449), digits(batch=449, seed=5)
    train, held_out = _rows(map(recipe.batch, range(3))), _rows(_held_out(recipe))
    assert sum(len(labels) for _, labels in _held_out(recipe)) == 450
    assert len(train) == 1347
    assert not train & held_out
    assert _rows(map(other.batch, range(3))) == train
    assert _rows(_held_out(other)) == held_out
    assert not torch.equal(recipe.batch(0)[0], other.batch(0)[0]), "the seed changes the order"
    inputs, labels = recipe.batch(0)
    assert (inputs.min(), inputs.max()) == (0.0, 1.0)
    assert set(labels.tolist()) == set(range(10))


def test_mlp_goes_through_few_batches_made_ahead() -> None:
    recipe = mlp(hidden=8, layers=3, batch=4)
    assert len(run_reference(recipe, Plan(steps=10, stages=2)).losses) == 10
    assert torch.equal(recipe.batch(0)[0], recipe.batch(8)[0])


@pytest.mark.parametrize("name", ["digits", "mlp"])
def test_built_in_recipes_can_travel_to_the_workers(name: str) -> None:
    check_travels(NamedRecipe(name))
    assert NamedRecipe(name)().name == name
    assert check_plan(BUILT_IN[name].plan)


# ---------------------------------------------------------------- mnist


def _idx(values: np.ndarray[Any, Any]) -> bytes:
    """The bytes of an IDX file."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()


@pytest.fixture(params=["", ".gz"], ids=["plain", "gz"])
def mnist_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Twenty images to train, seven to test: label i has one bright row i."""
    for part, rows in (("train", 20), ("t10k", 7)):
        labels = np.arange(rows, dtype=np.uint8) % 10
        images = np.zeros((rows, 28, 28), np.uint8)
        images[np.arange(rows), labels] = 255
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            content = _idx(values)
            (tmp_path / f"{name}{request.param}").write_bytes(gzip.compress(content) if request.param else content)
    return tmp_path


def test_a_tiny_mnist_trains(mnist_dir: Path) -> None:
    recipe = mnist(data=mnist_dir, hidden=8, layers=3, batch=4)
    result = run_reference(recipe, Plan(steps=5, stages=3))
    assert len(result.losses) == 5
    ((_, scores),) = result.scores
    assert scores.rows == 7
    inputs, labels = recipe.batch(0)
    bright = (inputs > 0).view(4, 28, 28)
    assert torch.equal(bright.any(2).int().argmax(1), labels), "images and labels belong together"
    assert bright.sum() == 4 * 28
    assert inputs.max() == pytest.approx((1 - 0.1307) / 0.3081)


def _broken(folder: Path) -> str:
    with pytest.raises(PlanError) as caught:
        resolve(mnist(data=folder, hidden=8, layers=2, batch=4), Plan(steps=2))
    return str(caught.value)


def _small_mnist(folder: Path, **files: bytes) -> Path:
    """Four correct files, some replaced."""
    correct = {
        f"{part}_{what}": _idx(np.zeros(shape, np.uint8))
        for part in ("train", "t10k")
        for what, shape in (("images", (8, 28, 28)), ("labels", (8,)))
    }
    for name, content in {**correct, **files}.items():
        part, what = name.split("_")
        (folder / f"{part}-{what}-idx{3 if what == 'images' else 1}-ubyte").write_bytes(content)
    return folder


def test_mnist_without_its_files(tmp_path: Path) -> None:
    assert _broken(tmp_path) == (
        f"no train-images-idx3-ubyte (or train-images-idx3-ubyte.gz) in {tmp_path}: give the folder of the MNIST files "
        "with --data."
    )


def test_mnist_cut_short(tmp_path: Path) -> None:
    folder = _small_mnist(tmp_path, train_images=_idx(np.zeros((8, 28, 28), np.uint8))[:-100])
    assert _broken(folder) == (
        f"{tmp_path}/train-images-idx3-ubyte is cut short: 6172 values where its header says 6272."
    )


def test_mnist_cut_short_in_its_header(tmp_path: Path) -> None:
    folder = _small_mnist(tmp_path, train_images=_idx(np.zeros((8, 28, 28), np.uint8))[:10])
    assert "train-images-idx3-ubyte is cut short" in _broken(folder)


@pytest.mark.parametrize("shape", [(8, 14, 14), (8, 28), (0, 28, 28), ()], ids=str)
def test_mnist_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    sentence = _broken(_small_mnist(tmp_path, train_images=_idx(np.zeros(shape, np.uint8))))
    assert sentence == (
        f"{tmp_path}/train-images-idx3-ubyte has the shape {list(shape)}, not ['number', 28, 28]: "
        "it is no such MNIST file."
    )


def test_mnist_labels_of_no_dimension(tmp_path: Path) -> None:
    """It was an IndexError: a single label has no number of labels."""
    sentence = _broken(_small_mnist(tmp_path, train_labels=_idx(np.zeros((), np.uint8))))
    assert sentence == f"{tmp_path}/train-labels-idx1-ubyte has the shape [], not ['number']: it is no such MNIST file."


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n"], ids=["empty", "html", "png"])
def test_mnist_that_is_something_else(content: bytes, tmp_path: Path) -> None:
    sentence = _broken(_small_mnist(tmp_path, train_labels=content))
    assert sentence.startswith(f"{tmp_path}/train-labels-idx1-ubyte is no IDX file of bytes: it begins with ")


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip at all",
        gzip.compress(_idx(np.zeros((8, 28, 28), np.uint8)))[:30],
        gzip.compress(b"")[:10] + bytes([7]) * 40,
    ],
    ids=["text", "cut short", "damaged"],
)
def test_mnist_packed_badly(content: bytes, tmp_path: Path) -> None:
    _small_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    assert _broken(tmp_path).startswith(f"{tmp_path}/train-images-idx3-ubyte.gz cannot be read: ")


def test_mnist_with_files_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = _small_mnist(tmp_path, train_labels=_idx(np.zeros(9, np.uint8)))
    sentence = f"{tmp_path} has 8 train images and 9 labels: the files do not belong together."
    assert _broken(folder) == sentence


# ---------------------------------------------------------------- chargpt


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A little text with 17 different characters."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox did not jump. " * 60)
    return path


def _tiny_gpt(text: Path, **options: Any) -> Recipe:
    return chargpt(**{"data": text, "width": 8, "blocks": 2, "heads": 2, "context": 6, "batch": 3, **options})


def test_a_tiny_chargpt_trains(text: Path) -> None:
    result = run_reference(_tiny_gpt(text), Plan(steps=5, stages=4))
    assert len(result.losses) == 5
    ((_, scores),) = result.scores
    vocabulary = len(set(text.read_text()))
    assert scores.answers == 10 * 3 * 6
    assert result.resolved.output_shape == (3, 6, vocabulary)
    assert result.losses[0] == pytest.approx(np.log(vocabulary), rel=0.1), "in nats, and knowing nothing at first"


def test_chargpt_is_causal(text: Path) -> None:
    """Changing a character changes no output before it, and its own."""
    recipe = _tiny_gpt(text)
    model = build_model(recipe, seed=1).eval()
    codes, _ = recipe.batch(0)
    for place in range(6):
        changed = codes.clone()
        changed[:, place] = (changed[:, place] + 1) % len(set(text.read_text()))
        with torch.no_grad():
            before, after = model(codes), model(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


def test_chargpt_predicts_the_next_character(text: Path) -> None:
    recipe, content = _tiny_gpt(text), text.read_text()
    characters = sorted(set(content))
    for index in range(20):
        for codes, following in zip(*recipe.batch(index), strict=True):
            assert torch.equal(codes[1:], following[:-1])
            row = "".join(characters[code] for code in [*codes.tolist(), int(following[-1])])
            assert row in content[: int(len(content) * 0.9)], "from the training part"


def test_chargpt_batch_i_is_a_function_of_seed_and_i(text: Path) -> None:
    first, again, other = _tiny_gpt(text), _tiny_gpt(text), _tiny_gpt(text, seed=1)
    assert torch.equal(first.batch(7)[0], again.batch(7)[0])
    assert not torch.equal(first.batch(7)[0], first.batch(8)[0])
    assert not torch.equal(first.batch(7)[0], other.batch(7)[0])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"too short", "{path} is too short for batches of 3 x 6 characters: lower --context or --batch."),
        (b"", "{path} is too short for batches of 3 x 6 characters: lower --context or --batch."),
        (b"\xff\xfe\x00", "{path} cannot be read as text: 'utf-8' codec can't decode byte 0xff in position 0"),
    ],
    ids=["short", "empty", "not UTF-8"],
)
def test_a_text_that_chargpt_cannot_use(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(PlanError) as caught:
        _tiny_gpt(path)
    assert str(caught.value).startswith(sentence.format(path=path))


def test_chargpt_without_a_text(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"missing.txt cannot be read as text: .*Give a UTF-8 text file with --data."):
        _tiny_gpt(tmp_path / "missing.txt")


def test_heads_divide_the_width(text: Path) -> None:
    with pytest.raises(PlanError, match=r"heads is 3: it must divide the width 8\."):
        _tiny_gpt(text, heads=3)


def test_a_text_of_one_held_out_row(tmp_path: Path) -> None:
    """Seven held-out characters give one row of six and no choice of its place: once an error of torch.randint."""
    path = tmp_path / "text.txt"
    path.write_text("ab" * 35)
    with pytest.raises(PlanError, match="too short for batches of 1 x 6 characters"):
        _tiny_gpt(path, batch=1)


# ---------------------------------------------------------------- options out of range


@pytest.mark.parametrize("recipe", [digits, mlp, partial(mnist, Path("nowhere"))], ids=["digits", "mlp", "mnist"])
@pytest.mark.parametrize("option", ["hidden", "layers", "batch"])
@pytest.mark.parametrize("bad", [0, -3])
def test_options_of_the_perceptrons_are_at_least_1(recipe: Callable[..., Recipe], option: str, bad: int) -> None:
    with pytest.raises(PlanError) as caught:
        recipe(**{option: bad})
    assert str(caught.value) == f"{option} is {bad}: it must be a whole number, at least 1."


@pytest.mark.parametrize("recipe", [mlp, partial(mnist, Path("nowhere"))], ids=["mlp", "mnist"])
def test_an_unknown_activation_function_is_named_with_the_known_ones(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(PlanError) as caught:
        recipe(activation="gellu")
    assert str(caught.value) == "unknown activation 'gellu'; did you mean 'gelu'? Valid: relu, gelu, silu, tanh."


def test_every_layer_of_a_perceptron_but_the_last_has_the_activation_function_asked_for() -> None:
    model = build_model(mlp(hidden=8, layers=2, batch=4, batch_norm=True, activation="silu"), 0)
    kinds = [type(module) for module in model.modules() if not isinstance(module, nn.Sequential)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.SiLU] * 2 + [nn.Linear]


@pytest.mark.parametrize("option", ["width", "blocks", "heads", "context", "batch"])
def test_options_of_chargpt_are_at_least_1(option: str, text: Path) -> None:
    with pytest.raises(PlanError) as caught:
        _tiny_gpt(text, **{option: 0})
    assert str(caught.value) == f"{option} is 0: it must be a whole number, at least 1."


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_dropout_of_chargpt_leaves_something(bad: float, text: Path) -> None:
    with pytest.raises(PlanError, match=r"dropout is .*: it must lie in \[0, 1\)\."):
        _tiny_gpt(text, dropout=bad)


def test_all_options_out_of_range_come_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        digits(hidden=0, batch=0)
    assert len(caught.value.problems) == 2


# ---------------------------------------------------------------- a user's file

FUNCTIONS = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy as loss
from pipeline import Plan

plan = Plan(stages=3, steps=4)

def model():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

def batches(step):
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return inputs, inputs[:, :3].argmax(1)
"""

RECIPE = (
    FUNCTIONS
    + """
from pipeline import Recipe

def recipe(width: int = 4, seed: int = 0) -> Recipe:
    return Recipe(name=f"mine-{width}-{seed}", model=model, batches=batches, loss=loss)
"""
)


def _file(tmp_path: Path, content: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(content)
    return str(path)


def test_a_file_of_functions_is_a_recipe(tmp_path: Path) -> None:
    name = _file(tmp_path, FUNCTIONS)
    plan, recipe = entry_of(name).plan, NamedRecipe(name)()
    assert (recipe.name, plan.stages, recipe.evaluation, recipe.correct) == ("mine", 3, None, None)
    assert len(run_reference(recipe, plan).losses) == 4
    check_travels(NamedRecipe(name))


def test_a_file_with_a_recipe_function_has_options(tmp_path: Path) -> None:
    name = _file(tmp_path, RECIPE)
    assert NamedRecipe(name)().name == "mine-4-0"
    assert NamedRecipe(name, (("width", 5), ("seed", 2)))().name == "mine-5-2"


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_a_recipe.py").write_text(FUNCTIONS)
    recipe = NamedRecipe(_file(tmp_path, "from beside_a_recipe import model, batches, loss"))()
    assert recipe.batch(0)[0].shape == (8, 4)


def test_a_file_may_import_what_lies_beside_it_when_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import inside a function comes long after the file itself was imported."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "imported_late.py").write_text(FUNCTIONS)
    late = "from imported_late import batches, loss\ndef model():\n    import imported_late\n"
    recipe = NamedRecipe(_file(tmp_path, late + "    return imported_late.model()\n"))()
    sys.modules.pop("imported_late")
    assert len(recipe.model()) == 3


def test_a_file_that_lacks_something(tmp_path: Path) -> None:
    name = _file(tmp_path, "def model(): ...\n")
    with pytest.raises(PlanError) as caught:
        entry_of(name)
    assert str(caught.value) == (
        f"{name} defines no batches, loss: a recipe file needs model(), batches(step) and loss(output, labels), "
        "or recipe() -> Recipe."
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (:", "SyntaxError: "),
    ],
    ids=["import", "exception", "syntax"],
)
def test_a_file_that_cannot_be_imported(content: str, reason: str, tmp_path: Path) -> None:
    name = _file(tmp_path, content)
    with pytest.raises(PlanError) as caught:
        entry_of(name)
    assert str(caught.value).startswith(f"{name} cannot be imported: {reason}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        entry_of(str(tmp_path / "missing.py"))
    assert str(caught.value) == (
        f"no recipe file {tmp_path / 'missing.py'}: give the path of a Python file, or one of {', '.join(BUILT_IN)}."
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("def recipe(): return 3", "recipe() in {path} gives a int: return a freewheel.Recipe."),
        ('plan = {{"stages": 3}}', "plan in {path} is a dict: give a freewheel.Plan, or leave it out."),
        ("recipe = 3", "recipe in {path} is a int: define a function recipe() -> Recipe."),
    ],
    ids=["no Recipe", "no Plan", "no function"],
)
def test_a_file_whose_parts_are_of_the_wrong_kind(content: str, sentence: str, tmp_path: Path) -> None:
    name = _file(tmp_path, f"{FUNCTIONS}\n{content.format()}\n")
    with pytest.raises(PlanError) as caught:
        resolve(NamedRecipe(name)(), entry_of(name).plan)
    assert str(caught.value) == sentence.format(path=name)


def test_what_cannot_be_copied_is_named_with_who_reads_it() -> None:
    """Inner functions and lambdas were refused altogether."""
    lock = threading.Lock()

    def inner(output: Tensor, labels: Tensor) -> Tensor:
        with lock:
            return F.cross_entropy(output, labels)

    with pytest.raises(PlanError, match=r"^loss cannot be handed to the workers, .* \(cannot pickle '_thread.lock'"):
        check_travels(GivenRecipe(_recipe(loss=inner)))
    check_travels(GivenRecipe(_recipe(loss=lambda output, labels: F.cross_entropy(output, labels))))
