"""Where a DNI's target comes from, against gradients worked out by hand with products of matrices.

The classic uneven example: layers 0 | 1-3 | 4-5 | 6-7, with DNIs after layers 0, 3 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import problems
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import DNIPlan, OptimizerPlan, Plan, Recipe, run_reference
from pipeline.messages.bundle import Bundle, Item, present
from pipeline.stage.stage import Stage

SIZES = (1, 3, 2, 2)
STEPS = 30


@dataclass
class Log:
    """What every stage saw, by (stage, batch)."""

    weights: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    synthetic: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    targets: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    loss_gradient: dict[int, Tensor] = field(default_factory=dict)

    def through(self, stage: int, batch: int, gradient: Tensor) -> Tensor:
        """J^T g by hand: h = x W1^T W2^T ..., so dL/dx = dL/dh ... W2 W1, with the weights the forward pass used."""
        for weight in reversed(self.weights[stage, batch]):
            gradient = gradient @ weight
        return gradient


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Listens in on every stage."""
    log = Log()
    forward, predict, learn = Stage.forward, Stage.predict, Stage.learn

    def logged_forward(self: Stage, item: Item, x: Bundle, context: Bundle, *, awaited: bool = False) -> Bundle:
        log.weights[self.index, item.batch] = [layer.module.weight.detach().clone() for layer in self.layers]  # type: ignore[union-attr, operator]
        output = forward(self, item, x, context, awaited=awaited)
        if self.last:  # mean cross-entropy: (softmax - onehot) / rows
            h, labels = present(output[0]), present(context[0])
            log.loss_gradient[item.batch] = (h.softmax(1) - F.one_hot(labels, h.shape[1])) / len(h)
        return output

    def logged_predict(self: Stage, item: Item) -> Bundle | None:
        gradient = predict(self, item)
        if gradient is not None:
            log.synthetic[self.index, item.batch] = present(gradient[0]).clone()
        return gradient

    def logged_learn(self: Stage, item: Item, gradient: Bundle) -> Bundle | None:
        log.targets[self.index, item.batch] = present(gradient[0]).clone()
        return learn(self, item, gradient)

    monkeypatch.setattr(Stage, "forward", logged_forward)
    monkeypatch.setattr(Stage, "predict", logged_predict)
    monkeypatch.setattr(Stage, "learn", logged_learn)
    return log


def _batch(index: int) -> tuple[Tensor, Tensor]:
    inputs, labels = problems.batch(index, width=6)
    return inputs, labels % 3


def _run(**plan: Any) -> None:
    recipe = Recipe(name="hand", model=problems.eight_linear, batches=_batch, loss=F.cross_entropy)
    run_reference(
        recipe,
        Plan(
            stages=4,
            sizes=SIZES,
            steps=STEPS,
            optimizer=OptimizerPlan(rule="sgd", lr=0.05),
            **{"dni": DNIPlan(form="linear"), **plan},
        ),
    )


def _close(mine: Tensor, by_hand: Tensor) -> None:
    torch.testing.assert_close(mine, by_hand, rtol=1e-4, atol=1e-7)


def test_bootstrap_each_dni_learns_from_the_dni_above_and_only_the_last_from_the_loss(log: Log) -> None:
    _run(targets="bootstrap")
    for b in range(STEPS):
        _close(log.targets[0, b], log.through(1, b, log.synthetic[1, b]))  # DNI_0 from DNI_3 through layers 1 to 3
        _close(log.targets[1, b], log.through(2, b, log.synthetic[2, b]))  # DNI_3 from DNI_5 through layers 4 and 5
        _close(log.targets[2, b], log.through(3, b, log.loss_gradient[b]))  # DNI_5 from the loss through 6 and 7
    assert log.synthetic[2, STEPS - 1].any(), "the DNI above has learned something by now"


def test_true_every_dni_learns_the_gradient_of_the_loss(log: Log) -> None:
    _run(targets="true")
    for b in range(STEPS):
        gradient = log.loss_gradient[b]
        for stage in (3, 2, 1):
            gradient = log.through(stage, b, gradient)
            _close(log.targets[stage - 1, b], gradient)


def test_mixed_is_the_weighted_sum_of_true_and_synthetic(log: Log) -> None:
    _run(targets="mixed", mix=0.25)
    for b in range(STEPS):
        for stage in (1, 2):
            mixed = 0.25 * log.targets[stage, b] + 0.75 * log.synthetic[stage, b]
            _close(log.targets[stage - 1, b], log.through(stage, b, mixed))


def test_targets_of_every_third_batch(log: Log) -> None:
    _run(targets="true", dni=DNIPlan(form="linear", every=3))
    assert {b for _, b in log.targets} == set(range(0, STEPS, 3))


def test_the_update_itself_uses_the_synthetic_gradient(log: Log) -> None:
    """SGD: the weight of layer 0 moves by -lr * (s W^T ...) = -lr * s^T x, and by nothing else."""
    _run(targets="true")
    for b in range(STEPS - 1):
        x, _ = _batch(b)
        moved = log.weights[0, b + 1][0] - log.weights[0, b][0]
        torch.testing.assert_close(moved, -0.05 * log.synthetic[0, b].T @ x, rtol=1e-3, atol=1e-7)


def test_hop_delay_makes_targets_older_but_not_different(log: Log) -> None:
    """A target belongs to the weights its forward pass used, however late it comes: the weights are stashed."""
    _run(targets="true", hop_steps=3)
    for b in range(STEPS):
        by_hand = log.through(1, b, log.through(2, b, log.through(3, b, log.loss_gradient[b])))
        _close(log.targets[0, b], by_hand)


def test_a_stage_without_parameters_relays_like_any_other() -> None:
    """Once a story: the middle stage was a lone ReLU, and backpropagating into no parameter at all raised an error."""
    plan = Plan(stages=3, sizes=(2, 1, 5), steps=6, targets="true")
    assert len(run_reference(problems.recipe(), plan).losses) == 6
