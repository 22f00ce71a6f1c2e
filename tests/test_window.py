"""Only the samples a DNI trains on have their input gradient computed and sent; nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import DNIPlan, Plan, Recipe
from pipeline.data.network import stage_layers
from pipeline.dni.row_window import RowSubsample, on_rows
from pipeline.messages.bundle import Item, present
from pipeline.run.reference import run_reference
from pipeline.run.resolve import resolve
from pipeline.stage.stage import Stage

ROWS = 40


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))


def _batch(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(ROWS, 8, generator=generator), torch.randint(4, (ROWS,), generator=generator)


RECIPE = Recipe(name="small", model=_model, batches=_batch, loss=F.cross_entropy, steps=6)
PLAN = Plan(stages=2, sizes=(2, 3), mode="unlocked", dni=DNIPlan(rows=0.25, every=1), seed=3)


def _last_stage(plan: Plan) -> Stage:
    resolved = resolve(RECIPE, plan)
    return Stage(stage_layers(RECIPE, resolved.plan, 1), 1, resolved.plan, RECIPE, below=resolved.cuts[0])


@pytest.mark.parametrize("shape", [(ROWS, 8), (ROWS, 3, 8)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_layer_on_a_window_equals_the_layer_and_finds_the_gradient_of_the_window(
    shape: tuple[int, ...], bias: bool, nested: bool
) -> None:
    torch.manual_seed(0)
    layer, samples = nn.Linear(8, 5, bias=bias), slice(10, 20)
    x = torch.randn(shape)
    whole = x.clone().requires_grad_()
    layer(whole).square().sum().backward()
    assert whole.grad is not None
    wanted = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    leaf = x[samples].detach().requires_grad_()
    enter = on_rows(nn.Sequential(layer) if nested else layer, leaf, samples)
    assert enter is not None
    output = enter(x)
    output.square().sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(output, layer(x), rtol=0, atol=0)
    torch.testing.assert_close(leaf.grad, whole.grad[samples])
    for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_what_is_sent_down_is_the_input_gradient_of_the_window() -> None:
    stage = _last_stage(PLAN)
    x, labels = torch.randn(ROWS, 12).relu(), _batch(0)[1]
    network = nn.Sequential(*(layer.module for layer in stage_layers(RECIPE, stage.plan, 1)))
    whole = x.clone().requires_grad_()
    F.cross_entropy(network(whole), labels).backward()
    assert whole.grad is not None
    for batch in range(4):
        stage.forward(Item(batch), (x,), (labels,))
        sent = stage.backward(Item(batch), None)
        window = RowSubsample(PLAN.seed, 0, ROWS, ROWS // 4).of(batch)
        assert sent is not None
        torch.testing.assert_close(sent[0], whole.grad[window])


def test_a_first_layer_somebody_listens_to_is_called_as_it_is() -> None:
    stage, heard = _last_stage(PLAN), []
    first = stage.layers[0].module
    first.register_forward_hook(lambda module, x, output: heard.append(len(output)))
    x, labels = torch.randn(ROWS, 12), _batch(0)[1]
    stage.forward(Item(0), (x,), (labels,))
    sent = stage.backward(Item(0), None)
    assert heard == [ROWS]
    assert sent is not None
    assert len(present(sent[0])) == ROWS // 4


def test_training_is_the_same_whether_the_stage_above_sends_the_window_or_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow = run_reference(RECIPE, PLAN)
    monkeypatch.setattr("pipeline.stage.gradient_flow.Flow.window_suffices", False)
    full = run_reference(RECIPE, PLAN)
    for name, tensor in full.state_tensors().items():
        torch.testing.assert_close(narrow.state_tensors()[name], tensor, msg=name)


@pytest.mark.parametrize(
    ("targets", "stages", "narrow"),
    [("bootstrap", 3, {1, 2}), ("true", 3, {1}), ("mixed", 3, {1}), ("true", 2, {1})],
)
def test_what_is_relayed_further_down_travels_whole(targets: str, stages: int, narrow: set[int]) -> None:
    sizes = (2, 3) if stages == 2 else (2, 2, 1)
    resolved = resolve(RECIPE, replace(PLAN, stages=stages, sizes=sizes, targets=targets))
    for k in range(1, stages):
        cut = resolved.cuts[k] if k < stages - 1 else None
        layers = stage_layers(RECIPE, resolved.plan, k)
        stage = Stage(layers, k, resolved.plan, RECIPE, cut, resolved.cuts[k - 1])
        x = torch.randn(resolved.cuts[k - 1].activation.shape)
        h = present(stage.forward(Item(0), (x,), (_batch(0)[1],))[0])
        sent = stage.backward(Item(0), stage.predict(Item(0)))
        if sent is None:
            sent = stage.learn(Item(0), (torch.randn_like(h),))
        assert sent is not None
        assert len(present(sent[0])) == (ROWS // 4 if k in narrow else ROWS), k
