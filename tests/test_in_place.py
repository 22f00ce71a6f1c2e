"""What writes in place, at the beginning of a stage and in the loss, spoils nothing of anybody else's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import problems
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, train_alone
from torch import Tensor, nn

from pipeline import Plan, Recipe, run_reference
from pipeline.data.recipe import Batch
from pipeline.model.unwritten import Unwritten


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.call(x)


def _add(x: Tensor) -> Tensor:
    return x.add_(1)


def _set(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def _out(x: Tensor) -> Tensor:
    return torch.mul(x.detach(), 2, out=x.detach()) if not torch.is_grad_enabled() else x.mul_(2)


def _through_a_view(x: Tensor) -> Tensor:
    x.view(-1)[::2].mul_(2)
    return x


WRITERS: dict[str, Callable[[], list[nn.Module]]] = {
    "module": lambda: [nn.ReLU(inplace=True)],
    "function": lambda: [Function(partial(F.relu, inplace=True))],
    "add_": lambda: [Function(_add)],
    "item": lambda: [Function(_set)],
    "out": lambda: [Function(_out)],
    "view": lambda: [Function(_through_a_view)],
    "behind an identity": lambda: [nn.Identity(), Function(_add)],
    "behind a view": lambda: [nn.Flatten(), nn.ReLU(inplace=True)],
}


def _model(writer: str) -> nn.Sequential:
    """Writers first, in the middle and in front of the last layer."""
    w = WRITERS[writer]
    return nn.Sequential(
        *w(), nn.Linear(problems.WIDTH, 8), *w(), nn.Linear(8, 8), *w(), nn.Linear(8, problems.CLASSES)
    )


def _recipe(writer: str, data: list[Batch] | None = None) -> Recipe:
    return Recipe(
        name="writes",
        model=partial(_model, writer),
        batches=data or problems.batch,
        loss=F.cross_entropy,
        evaluation=(lambda: data[:1]) if data else problems.held_out,
    )


@pytest.mark.parametrize("writer", WRITERS)
def test_a_stage_may_begin_with_what_writes_into_its_input(writer: str) -> None:
    """`F.relu(x, inplace=True)` at the beginning of a stage once failed at batch 0: the input is autograd's leaf."""
    plan = Plan(mode="naive", steps=3)
    model, _, losses = train_alone(_recipe(writer), plan)
    n = len(WRITERS[writer]())
    for sizes in ((2 * n + 2, n + 1), (n, 1, n, 1, n + 1), (n + 1, n + 1, n, 1)):
        mine = run_reference(_recipe(writer), Plan(mode="naive", steps=3, stages=len(sizes), sizes=sizes))
        assert_same(mine.state_tensors(), dict(model.state_dict()))
        assert mine.losses == losses


@pytest.mark.parametrize("mode", ["naive", "async-1f1b", "local", "unlocked"])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_users_data_stays_as_it_is(writer: str, mode: str) -> None:
    """A list of batches is gone through again and again: what layers wrote into it would be trained on."""
    data = [problems.batch(i) for i in range(2)]
    before = [(x.clone(), y.clone()) for x, y in data]
    n = len(WRITERS[writer]())
    run_reference(_recipe(writer, data), Plan(mode=mode, steps=4, stages=2, sizes=(n + 1, 2 * n + 2)))
    for mine, theirs in zip(data, before, strict=True):
        assert all(map(torch.equal, mine, theirs))


def _loss_that_writes(output: Tensor, labels: Tensor) -> Tensor:
    output.mul_(0.5)
    labels.clamp_(max=2)
    return F.cross_entropy(output, labels)


def _loss_that_does_not(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output * 0.5, labels.clamp(max=2))


def _correct(output: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Sees what the loss was given, not what it made of it."""
    return (labels > 2).sum() + (output.abs() > 0.1).sum(), labels.numel() + output.numel()


@pytest.mark.parametrize("mode", ["naive", "gpipe", "async-1f1b", "local", "unlocked"])
def test_a_loss_that_writes_in_place_gives_the_numbers_of_one_that_does_not(mode: str) -> None:
    """Unlocked, it once failed inside torch: the output of a DNI's head is autograd's leaf."""
    runs = []
    for loss in (_loss_that_writes, _loss_that_does_not):
        data = [problems.batch(i) for i in range(2)]
        recipe = Recipe(
            name="loss",
            model=problems.two_linear,
            batches=data,
            loss=loss,
            evaluation=lambda data=data: data,  # type: ignore[misc]
            correct=_correct,
        )
        runs.append(run_reference(recipe, Plan(mode=mode, steps=6, stages=2)))
        assert all(torch.equal(y, problems.batch(i)[1]) for i, (_, y) in enumerate(data))
    writes, does_not = runs
    assert_same(writes.state_tensors(), does_not.state_tensors())
    assert writes.losses == does_not.losses
    assert writes.scores == does_not.scores


def test_who_does_not_write_gets_no_copies() -> None:
    """But for the first call of each kind."""
    seen: list[Tensor] = []

    def reads(x: Tensor) -> Tensor:
        seen.append(x)
        return x * 2

    x, call = torch.ones(3), Unwritten(reads)
    for _ in range(3):
        call(x)
    with torch.no_grad():
        call(x)
        call(x)
    assert [each is x for each in seen] == [False, True, True, False, True]


def test_a_copy_has_the_strides_of_the_tensor() -> None:
    """Kernels round by them."""
    seen = []
    call = Unwritten(lambda x: seen.append(x.stride()))
    call(torch.ones(4, 6)[:, 1:4])
    call(torch.ones(4, 6).t())
    assert seen == [(6, 1), (1, 6)]
