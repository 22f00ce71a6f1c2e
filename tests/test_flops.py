"""Floating-point operations against numbers worked out by hand: a product of [m, k] and [k, n] is 2 m k n of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import problems
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from torch import Tensor, nn

from launch.recipes.mlp import mlp
from launch.recipes.perceptron import perceptron
from pipeline import Batch, DNIPlan, Plan, Recipe, StageError, run_reference
from pipeline.run.flops import StageFlops, count_flops
from pipeline.run.resolve import resolve

H, B, C = 48, 256, 10  # width of every layer, rows of a batch, classes
FULL, HEAD = 2 * B * H * H, 2 * B * H * C  # one product of a hidden layer, and of the head
WINDOW = 128  # rows that label_residual and loss_model take of a target at most


def _count(recipe: Recipe, **plan: Any) -> tuple[StageFlops, ...]:
    resolved = resolve(recipe, Plan(balance="layers", **plan))
    return count_flops(recipe, resolved.plan, resolved.cuts)


def _loss_model(rows: int, trained_on: int, often: float = 1 / 4, *, softened: bool = True) -> float:
    """Every batch: outputs of all rows, the gradient of the head's weights, the way back; once more to the head's
    normalisation where what is learned is not what is asked. Every target: outputs and the way back, for how large that
    is."""
    return (4 if softened else 3) * 2 * rows * H * C + often * 2 * 2 * trained_on * H * C


def _label_residual(rows: int, trained_on: int, often: float = 1 / 4) -> float:
    """Every batch: residuals of all rows, the gradient of C, and the way back. Every target: residuals, R^T T,
    R^T R, and that times A."""
    met = 2 * rows * H * C + 2 * trained_on * H * C + 2 * rows * C * H
    learned = 2 * trained_on * H * C + 2 * trained_on * C * H + 2 * trained_on * C * C + 2 * C * C * H
    return met + often * learned


# four hidden layers and the head; stage 0 has two layers, stage 1 two and the head
RECIPE = mlp(hidden=H, layers=4, batch=B)
BELOW, ABOVE = (2 * FULL, 3 * FULL), (2 * FULL + HEAD, 4 * FULL + 2 * HEAD)  # (forward, backward)
"""Forward is a product per layer, backward two, less one for the gradient of the data."""


def _above(window: int, often: float = 1.0) -> tuple[float, float]:
    """ABOVE, where the DNI below trains on ``window`` rows of one batch in 1/``often``: the first layer finds the input
    gradient of those only."""
    return ABOVE[0], ABOVE[1] - FULL + often * FULL * window / B


def _of(pair: tuple[float, float], **others: float) -> StageFlops:
    return StageFlops(forward=pair[0], backward=pair[1], **others)


@pytest.mark.parametrize(
    "plan", [{"mode": "naive"}, {"mode": "gpipe", "microbatches": 4}, {"mode": "1f1b", "microbatches": 2}], ids=str
)
def test_locked_stages_do_together_what_one_process_does(plan: dict[str, Any]) -> None:
    assert _count(RECIPE, sizes=(2, 3), **plan) == (_of(BELOW), _of(ABOVE))
    (alone,) = _count(RECIPE, stages=1, mode="naive")
    assert alone == _of((BELOW[0] + ABOVE[0], BELOW[1] + ABOVE[1]))


def test_stashed_weights_cost_no_product() -> None:
    assert _count(RECIPE, sizes=(2, 3), mode="async-1f1b") == (_of(BELOW), _of(ABOVE))


def test_unlocked_adds_the_dni_and_nothing_else() -> None:
    """K = 2, loss_model: it predicts for all rows and needs the gradient of 128 rows of every fourth batch."""
    assert _count(RECIPE, sizes=(2, 3)) == (_of(BELOW, dni=_loss_model(B, WINDOW)), _of(_above(WINDOW, 1 / 4)))


@pytest.mark.parametrize(
    ("dni", "dni_flop", "above"),
    [
        (DNIPlan(form="label_residual"), _label_residual(B, WINDOW), _above(WINDOW, 1 / 4)),
        (DNIPlan(form="label_residual", rows=0.25), _label_residual(B, B // 4), _above(B // 4, 1 / 4)),
        (DNIPlan(form="label_residual", every=2), _label_residual(B, WINDOW, 1 / 2), _above(WINDOW, 1 / 2)),
        (DNIPlan(form="linear"), 3 * 2 * B * (H + C) * H, _above(B)),
    ],
    ids=[
        "label_residual",
        "a quarter of the rows",
        "every second target",
        "linear: prediction, prediction again, its weights",
    ],
)
def test_what_the_dni_does_counts(dni: DNIPlan, dni_flop: float, above: tuple[float, float]) -> None:
    assert _count(RECIPE, sizes=(2, 3), dni=dni) == (_of(BELOW, dni=dni_flop), _of(above))


@pytest.mark.parametrize(("targets", "every"), [("true", 1), ("mixed", 1), ("true", 4), ("mixed", 5)])
def test_a_relay_is_the_input_gradient_of_the_stages_between(targets: str, every: int) -> None:
    """Two layers each; of one batch in ``every`` the gradient flows, and only then is an input gradient taken."""
    first, between, last = _count(RECIPE, stages=3, sizes=(1, 2, 2), targets=targets, dni=DNIPlan(every=every))
    _same(first, _of((FULL, FULL), dni=_loss_model(B, WINDOW, 1 / every, softened=False)))
    _same(between, _of((2 * FULL, 3 * FULL), dni=_loss_model(B, WINDOW, 1 / every), relay=2 * FULL / every))
    _same(last, _of((FULL + HEAD, FULL + 2 * HEAD + FULL / every)))


def _same(mine: StageFlops, truth: StageFlops) -> None:
    for name in ("forward", "backward", "dni", "relay"):
        assert getattr(mine, name) == pytest.approx(getattr(truth, name), rel=1e-12), name
    assert mine.total == pytest.approx(truth.forward + truth.backward + truth.dni + truth.relay)


def test_a_local_loss_takes_no_input_gradient_and_three_products_per_layer_of_its_head() -> None:
    hidden = 16
    below, above = _count(RECIPE, sizes=(2, 3), mode="local", dni=DNIPlan(hidden=hidden))
    assert below == _of(BELOW, dni=3 * (2 * B * H * hidden + 2 * B * hidden * C))
    assert above == _of((ABOVE[0], ABOVE[1] - FULL)), "nothing is sent down"


class Attention(nn.Module):
    """Self-attention without projections."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, heads, time, width], float32."""
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def attending() -> nn.Sequential:
    """A projection, and attention over what it gives."""
    return nn.Sequential(nn.Linear(8, 8), Attention())


def positions(index: int) -> Batch:
    """[rows, heads, time, width] and targets of the same shape."""
    inputs = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(index))
    return inputs, inputs


def test_attention_on_the_cpu_counts() -> None:
    """Two products forward; backward five, as the scores are computed again. It was once 0: torch knows GPUs only."""
    recipe = Recipe(name="attention", model=attending, batches=positions, loss=F.mse_loss, steps=2)
    (alone,) = _count(recipe, stages=1, mode="naive")
    product, projection = 2 * 3 * 2 * 5 * 5 * 8, 2 * 3 * 2 * 5 * 8 * 8
    assert alone == _of((2 * product + projection, 5 * product + projection))


@pytest.mark.parametrize("mode", ["naive", "async-1f1b", "local", "unlocked"])
def test_counting_changes_no_run(mode: str) -> None:
    """Dropout, BatchNorm and layers that write to their input: neither weights nor random numbers are touched."""
    recipe, plan = problems.recipe(), Plan(stages=2, sizes=(3, 5), steps=4, mode=mode)
    truth = run_reference(recipe, plan).state_tensors()
    before = torch.get_rng_state()
    resolved = resolve(recipe, plan)
    assert torch.equal(torch.get_rng_state(), before)
    first = count_flops(recipe, resolved.plan, resolved.cuts)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(run_reference(recipe, plan).state_tensors(), truth)
    assert count_flops(recipe, resolved.plan, resolved.cuts) == first
    assert not [hooks for hooks in _global_hooks() if hooks]


def _global_hooks() -> list[Any]:
    from torch.nn.modules import module

    return [module._global_forward_pre_hooks, module._global_forward_hooks]


def test_every_relay_of_a_network_with_everything_is_counted() -> None:
    """torch's own tracker of modules hooks a stage's input, and a relay then fails."""
    counted = _count(problems.recipe(), stages=4, sizes=(1, 3, 2, 2), targets="true", dni=DNIPlan(every=1))
    product = 2 * problems.ROWS * 24 * 24
    assert [stage.relay for stage in counted] == [0, 0, product, 0], "there is no product in the layers of stage 1"


def test_a_layer_that_fails_is_named() -> None:
    recipe = replace(RECIPE, model=partial(_with_failure, RECIPE))
    resolved = resolve(replace(RECIPE, model=partial(perceptron, H, H, 6, C)), Plan(sizes=(2, 4)))
    with pytest.raises(StageError, match="stage 1, layer 5, batch 0: ZeroDivisionError: as planned"):
        count_flops(recipe, resolved.plan, resolved.cuts)


def _with_failure(recipe: Recipe) -> nn.Sequential:
    return nn.Sequential(*perceptron(H, H, 5, C), problems.FailsAt(0))
