"""The convolutional recipe: its images, its shapes, split and unsplit, and the DNIs that its cuts get."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.recipes.cnn import cnn, convolutions
from launch.recipes.digits import digits
from launch.setup.recipe_source import NamedRecipe, check_travels
from pipeline import DNIPlan, Plan, PlanError, Recipe, run_reference
from pipeline.run.resolve import resolve
from tests.oracle import assert_same, train_alone
from tests.test_cli import freewheel


@pytest.fixture(scope="module")
def small() -> Recipe:
    """Few channels on digits; one held-out batch."""
    recipe = cnn(width=4, batch=32)
    assert recipe.evaluation is not None
    first = next(iter(recipe.evaluation()))
    return replace(recipe, evaluation=lambda: [first])


def test_the_images_are_those_of_the_perceptrons_in_two_dimensions() -> None:
    recipe, flat = cnn(batch=32, seed=3), digits(batch=32, seed=3)
    inputs, labels = recipe.batch(5)
    assert inputs.shape == (32, 1, 8, 8)
    assert torch.equal(inputs.flatten(1), flat.batch(5)[0])
    assert torch.equal(labels, flat.batch(5)[1])
    assert recipe.evaluation is not None
    assert sum(len(labels) for _, labels in recipe.evaluation()) == 450


@pytest.mark.parametrize(
    ("side", "sides"), [(28, [14, 7, 4, 4]), (8, [8, 4, 2, 2]), (16, [8, 4, 2, 2]), (9, [9, 5, 3, 3])]
)
def test_convolutions_halve_the_image(side: int, sides: list[int]) -> None:
    model, x, seen = convolutions(side, 3, 10), torch.zeros(2, 1, side, side), []
    for block in model[:-1]:
        x = block(x)
        seen.append(x.shape[-1])
    assert seen == sides
    assert x.shape[1] == 12
    assert model[-1](x).shape == (2, 10)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 4
    bare = convolutions(side, 3, 10, batch_norm=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in bare.modules())


def test_locked_training_of_four_stages_equals_one_process(small: Recipe) -> None:
    plan = Plan(mode="naive", stages=4, steps=6)
    model, _, losses = train_alone(small, plan)
    result = run_reference(small, plan)
    assert_same(result.state_tensors(), dict(model.state_dict()))
    assert result.losses == losses


@pytest.mark.parametrize(
    "dni", [DNIPlan(), DNIPlan(form="conv", hidden=8), DNIPlan(form="label_residual")], ids=lambda dni: dni.form
)
def test_every_form_that_fits_a_convolutional_cut_learns(small: Recipe, dni: DNIPlan) -> None:
    result = run_reference(small, Plan(stages=4, steps=60, dni=dni))
    assert sum(result.losses[-10:]) < 0.8 * sum(result.losses[:10])


def test_what_auto_takes_for_a_convolutional_cut(small: Recipe) -> None:
    resolved = resolve(small, Plan(stages=4))
    assert [cut.activation.shape for cut in resolved.cuts] == [(32, 4, 8, 8), (32, 8, 4, 4), (32, 16, 2, 2)]
    assert {what: value for what, value, _ in resolved.reasons}["DNI"] == "loss_model"


def test_it_is_a_recipe_of_the_command_line(tmp_path: Path) -> None:
    check_travels(NamedRecipe("cnn"))
    ended = freewheel("sweep", "cnn", "--steps", "4", "--stages", "4", "--seeds", "0", "--runs", tmp_path)
    assert (ended.status, ended.err) == (0, "")
    assert "cnn: sweep of 1 settings with 1 seed each" in ended.out


@pytest.mark.parametrize("option", ["width", "batch"])
def test_options_are_at_least_1(option: str) -> None:
    with pytest.raises(PlanError, match=f"{option} is 0: it must be a whole number, at least 1"):
        cnn(**{option: 0})


def test_a_folder_without_mnist_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no train-images-idx3-ubyte"):
        cnn(data=tmp_path).batch(0)
