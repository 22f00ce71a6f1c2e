"""The promises of a DNI: units, clip, what each form predicts, what is left alone, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuts import changed, cut_like
from oracle import assert_same_state
from torch import Tensor, nn

from pipeline.dni.dni import DNI, FORMS, _Adam, build_dni, describe_form, target_every
from pipeline.dni.heads import Head, head_for
from pipeline.dni.loss_model import _cross_entropy_slope, _slope_of
from pipeline.errors import PlanError
from pipeline.model.cut import Cut
from pipeline.plan.names import DNI_FORMS
from pipeline.plan.plan import DNIPlan

ROWS, WIDTH, CLASSES = 32, 12, 5

CLASSIFIER = cut_like((ROWS, WIDTH), (ROWS,), (ROWS, CLASSES), index=1)
REGRESSION = cut_like((ROWS, WIDTH), (ROWS, 3), (ROWS, 3), labels_dtype=torch.float32, loss=F.mse_loss, index=1)
TOKENS = changed(
    CLASSIFIER,
    activation=(8, 6, WIDTH),
    labels=(8, 6),
    output=(8, 6, CLASSES),
    loss=lambda output, labels: F.cross_entropy(output.flatten(0, 1), labels.flatten()),
)
IMAGES = changed(CLASSIFIER, activation=(ROWS, 3, 6, 6))
MANY_CLASSES = changed(CLASSIFIER, output=(ROWS, 3 * ROWS))
PIXELS = changed(IMAGES, labels=(ROWS, 12, 12), output=(ROWS, CLASSES, 12, 12))
NORMALISED = [replace(cut, normalised=True) for cut in (CLASSIFIER, REGRESSION, TOKENS)]
"""Here the head of a loss model is a linear layer and nothing else."""

Batches = Callable[[], tuple[Tensor, Tensor, Tensor]]


def problem(cut: Cut, scale: float = 1.0, learned: bool = False) -> Batches:
    """Batches (h, labels, g) whose g is the gradient of ``cut.loss`` behind a fixed linear top.

    ``learned``: the top gives nearly what the labels ask for; else it is drawn at random.
    """
    generator = torch.Generator().manual_seed(0)
    shape, output_shape = cut.activation.shape, cut.output.shape
    rowwise = shape[:-1] == output_shape[:-1]
    width = shape[-1] if rowwise else torch.Size(shape[1:]).numel()
    num_outputs = output_shape[-1] if rowwise else torch.Size(output_shape[1:]).numel()
    top = torch.randn(width, num_outputs, generator=generator) / width**0.5
    rule = torch.randn(width, num_outputs, generator=generator) * 2
    if learned:
        top = rule / (2 * width**0.5)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        h = torch.randn(shape, generator=generator, dtype=cut.activation.dtype).requires_grad_()
        flat = (h if rowwise else h.flatten(1)).float()
        right = (flat.detach() @ rule).reshape(output_shape)
        if cut.classes is not None:
            labels = right.argmax(1 if output_shape[:-1] != cut.labels.shape else -1)
        else:
            labels = right / width**0.5
        (g,) = torch.autograd.grad(scale * cut.loss((flat @ top).reshape(output_shape), labels), h)
        return h.detach(), labels, g

    return batch


def trained(cut: Cut, steps: int, scale: float = 1.0, learned: bool = False, **plan: Any) -> tuple[DNI, list[float]]:
    dni, batch, errors = build_dni(cut, DNIPlan(**plan), seed=0), problem(cut, scale, learned), []
    for index in range(steps):
        sample = batch()
        errors.append(float(dni.relative_error(*sample)))
        dni.meet(*sample[:2], batch=index)
        dni.learn(*sample, batch=index)
    return dni, errors


def _parts(dni: DNI) -> list[nn.Parameter]:
    return [dni.form.get_parameter(name) for name in ("local.weight", "local.bias", "back")]


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


# Units


@pytest.mark.parametrize("form", ["linear", "mlp", "label_residual", "loss_model"])
def test_predicts_zeros_until_the_first_target_came(form: str) -> None:
    dni = build_dni(CLASSIFIER, DNIPlan(form=form), seed=0)
    h, labels, g = problem(CLASSIFIER)()
    assert torch.equal(dni.predict(h, labels), torch.zeros_like(h))
    dni.learn(h, labels, g, batch=0)
    assert dni.predict(h, labels).any()


def test_a_target_of_zeros_before_the_first_real_one_is_no_target() -> None:
    """Under bootstrap the DNI above predicts zeros at first: an early version then divided by sigma 0."""
    dni = build_dni(CLASSIFIER, DNIPlan(), seed=0)
    h, labels, g = problem(CLASSIFIER)()
    assert dni.learn(h, labels, torch.zeros_like(g), batch=0) is False
    assert not dni.predict(h, labels).any()
    dni.learn(h, labels, g, batch=1)
    assert float(dni.sigma) == pytest.approx(rms(g), rel=1e-5)


@pytest.mark.parametrize("form", ["linear", "mlp", "label_residual"])
def test_tiny_gradients_are_learned_like_large_ones(form: str) -> None:
    one, _ = trained(CLASSIFIER, 20, form=form)
    tiny, _ = trained(CLASSIFIER, 20, scale=1e-6, form=form)
    h, labels, _ = problem(CLASSIFIER)()
    torch.testing.assert_close(tiny.predict(h, labels) * 1e6, one.predict(h, labels), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_a_loss_model_is_as_large_as_the_true_gradient(scale: float) -> None:
    dni, _ = trained(CLASSIFIER, 40, scale=scale, form="loss_model")
    h, labels, _ = problem(CLASSIFIER)()
    assert rms(dni.predict(h, labels)) == pytest.approx(float(dni.sigma), rel=0.1)


@pytest.mark.parametrize("cut", [CLASSIFIER, REGRESSION, TOKENS, IMAGES, PIXELS])
def test_the_size_of_a_loss_model_follows_that_of_its_targets(cut: Cut) -> None:
    """Of any part of a batch: half a batch weighs each sample twice in a mean. Where gradients vanish, it does too."""
    dni, batch = build_dni(cut, DNIPlan(form="loss_model"), seed=0), problem(cut)
    true = of_models = 0.0
    for index in range(30):
        h, labels, g = batch()
        g = g * 0.5**index
        some, sigma = slice(0, len(h) // 2), torch.tensor(0.3)
        leaf = h.clone().requires_grad_()
        (of_model,) = torch.autograd.grad(cut.loss(dni.form.head(leaf), labels), leaf)
        dni.form.gradients(h[some], labels[some], g[some] / sigma, sigma)
        true = 0.95 * true + float(g[some].square().sum())
        of_models = 0.95 * of_models + float(of_model[some].square().sum())
        assert float(dni.form.size * sigma) == pytest.approx((true / of_models) ** 0.5, rel=1e-3)


def test_sigma_is_the_bias_corrected_running_rms() -> None:
    dni, batch = build_dni(CLASSIFIER, DNIPlan(), seed=0), problem(CLASSIFIER)
    targets = [batch() for _ in range(3)]
    for index, (h, labels, g) in enumerate(targets):
        dni.learn(h, labels, g * 10**index, batch=index)
    weights = torch.tensor([0.99**2, 0.99, 1.0])
    squares = torch.tensor([rms(g * 10**index) ** 2 for index, (_, _, g) in enumerate(targets)])
    assert float(dni.sigma) == pytest.approx(float((weights * squares).sum() / weights.sum()) ** 0.5, rel=1e-4)


def test_predictions_are_clipped_to_sigma() -> None:
    class Loud(nn.Module):
        def forward(self, h: Tensor, labels: Tensor) -> Tensor:
            return 100 * torch.ones_like(h)

    dni = build_dni(CLASSIFIER, DNIPlan(factory=lambda cut: Loud()), seed=0)
    h, labels, g = problem(CLASSIFIER)()
    dni.learn(h, labels, g, batch=0)
    assert rms(dni.predict(h, labels)) == pytest.approx(float(dni.sigma), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_predictions_have_the_dtype_of_the_activation(dtype: torch.dtype) -> None:
    cut = changed(CLASSIFIER, dtype=dtype)
    dni, (h, labels, g) = build_dni(cut, DNIPlan(), seed=0), problem(cut)()
    dni.learn(h, labels, g, batch=0)
    prediction = dni.predict(h.requires_grad_(), labels)
    assert prediction.dtype == dtype
    assert not prediction.requires_grad


# What each form predicts


@pytest.mark.parametrize(
    ("cut", "form", "bound"),
    [
        (CLASSIFIER, "linear", 0.5),
        (CLASSIFIER, "mlp", 0.4),
        (CLASSIFIER, "label_residual", 0.6),
        (REGRESSION, "linear", 0.05),
        (REGRESSION, "mlp", 0.3),
        (TOKENS, "linear", 0.5),
        (TOKENS, "mlp", 0.4),
        (TOKENS, "label_residual", 0.6),
        (IMAGES, "conv", 0.9),
    ],
)
def test_error_falls(cut: Cut, form: str, bound: float) -> None:
    _, errors = trained(cut, 250, form=form, hidden=32, lr=1e-2)
    assert sum(errors[-10:]) / 10 < min(bound, errors[0])


@pytest.mark.parametrize("cut", [CLASSIFIER, TOKENS])
def test_the_error_of_a_loss_model_falls_where_the_top_has_learned_its_task(cut: Cut) -> None:
    """It knows what the labels want of h, and of what is above no more than how large its gradient is."""
    _, errors = trained(cut, 250, learned=True, form="loss_model", lr=1e-2)
    assert sum(errors[-10:]) / 10 < 0.7 * errors[0]


def test_relative_error_by_hand() -> None:
    dni, _ = trained(CLASSIFIER, 30, form="label_residual")
    h, labels, g = problem(CLASSIFIER)()
    error = (dni.predict(h, labels) - g).square().sum() / g.square().sum()
    assert float(dni.relative_error(h, labels, g)) == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("cut", [CLASSIFIER, REGRESSION, TOKENS, IMAGES, PIXELS, *NORMALISED])
def test_loss_model_is_the_gradient_of_its_own_loss(cut: Cut) -> None:
    dni = build_dni(cut, DNIPlan(form="loss_model"), seed=0)
    h, labels, _ = problem(cut)()
    dni.learn(h, labels, torch.randn_like(h) * 1e3, batch=0)  # a large sigma: nothing is clipped
    dni.form.size.copy_(2 / dni.sigma)
    h.requires_grad_()
    (expected,) = torch.autograd.grad(cut.loss(dni.form.head(h), labels), h)
    torch.testing.assert_close(dni.predict(h, labels), 2 * expected)


@pytest.mark.parametrize("cut", [CLASSIFIER, REGRESSION, TOKENS, IMAGES, PIXELS, *NORMALISED])
def test_loss_model_learns_from_its_own_loss_alone(cut: Cut) -> None:
    """C by the gradients that autograd gives, over all samples, whatever the target of the window says."""
    dni, _ = trained(cut, 20, form="loss_model")
    form, (h, labels, g) = dni.form, problem(cut)()
    form.meet(h, labels, dni.sigma, slice(0, len(h) // 2))
    form.gradients(h, labels, torch.randn_like(g), dni.sigma)
    own = torch.autograd.grad(cut.loss(form.head(h), labels), form.own_parameters())
    for parameter, right in zip(form.own_parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, right)
    assert not form.taught_parameters()


@pytest.mark.parametrize("cut", [CLASSIFIER, REGRESSION, TOKENS, *NORMALISED])
@pytest.mark.parametrize("learned", ["nothing", "the same", "another"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_differentiated_by_hand_gives_the_numbers_of_autograd(
    cut: Cut, learned: str, dtype: torch.dtype
) -> None:
    """To rounding, for an activation that is not contiguous too.

    It once asked for equal bits and failed on another processor: autograd forms some products transposed, on other
    strides, and in which order a product sums then is not promised.
    """
    bound = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    head, (h, labels, _) = head_for(cut, None).to(dtype), problem(cut)()
    assert type(head).differentiated is not Head.differentiated
    h, slope = h.to(dtype).transpose(0, -1).contiguous().transpose(0, -1), _slope_of(cut)
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    of_loss, of_half = (partial(lambda share, output: slope(output * share, labels), share) for share in (1.0, 0.5))
    asked, learns = of_half, {"nothing": None, "the same": of_half, "another": of_loss}[learned]
    found = []
    for differentiated in (head.differentiated, partial(Head.differentiated, head)):
        at_h = differentiated(h, asked, learns)
        found.append([at_h, *(parameter.grad for parameter in head.parameters() if learns is not None)])
    for by_hand, by_autograd in zip(*found, strict=True):
        torch.testing.assert_close(by_hand, by_autograd, rtol=bound, atol=bound * float(by_autograd.abs().max()))


def test_a_head_normalises_what_the_stage_does_not() -> None:
    def norms(cut: Cut) -> list[nn.Module]:
        return [m for m in build_dni(cut, DNIPlan(hidden=8), seed=0).modules() if isinstance(m, nn.LayerNorm)]

    assert len(norms(CLASSIFIER)) == 1
    assert not norms(NORMALISED[0])
    assert len(norms(replace(IMAGES, normalised=True))) == 1  # it pools what the stage has normalised


@pytest.mark.parametrize(
    ("loss", "closed"),
    [
        (F.cross_entropy, True),
        (nn.CrossEntropyLoss(), True),
        (nn.CrossEntropyLoss(label_smoothing=0.1), False),
        (nn.CrossEntropyLoss(ignore_index=-1), False),
        (nn.CrossEntropyLoss(weight=torch.rand(CLASSES)), False),
    ],
    ids=["function", "module", "smoothed", "another_ignored", "weighted"],
)
@pytest.mark.parametrize("ignored", [0, 1, 7, ROWS])
def test_the_slope_of_the_loss_is_that_of_autograd(loss: Any, closed: bool, ignored: int) -> None:
    """Of a window whose rows are all ignored too: that gives zeros, and would else end the run."""
    cut = replace(NORMALISED[0], loss=loss)
    slope = _slope_of(cut)
    assert (slope is _cross_entropy_slope) is closed
    _, labels, _ = problem(CLASSIFIER)()
    labels[:ignored] = getattr(loss, "ignore_index", -100)
    output = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (expected,) = torch.autograd.grad(loss(output, labels), output)
    torch.testing.assert_close(slope(output.detach(), labels), expected)


def test_labels_that_are_bytes_are_left_to_autograd() -> None:
    """cross_entropy takes them, a closed form with them as indices would not."""
    assert _slope_of(changed(NORMALISED[0], labels_dtype=torch.uint8)) is not _cross_entropy_slope


@pytest.mark.parametrize("cut", [CLASSIFIER, NORMALISED[0], IMAGES])
def test_a_temperature_softens_the_prediction_and_not_what_the_head_learns(cut: Cut) -> None:
    dni = build_dni(cut, DNIPlan(form="loss_model", temperature=2.0), seed=0)
    h, labels, g = problem(cut)()
    dni.learn(h, labels, torch.randn_like(g) * 1e3, batch=0)
    dni.form.size.copy_(1 / dni.sigma)
    h.requires_grad_()
    (softened,) = torch.autograd.grad(2 * cut.loss(dni.form.head(h) / 2, labels), h)
    own = torch.autograd.grad(cut.loss(dni.form.head(h), labels), dni.form.own_parameters())
    prediction, _ = dni.form.meet(h.detach(), labels, dni.sigma, slice(None))
    torch.testing.assert_close(prediction, softened)
    for parameter, right in zip(dni.form.own_parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, right)


@pytest.mark.parametrize(
    ("uppermost", "depth", "given", "temperature"),
    [(True, 2, None, 2), (True, 1, None, 1), (False, 2, None, 1), (True, 2, 1.0, 1), (False, 1, 3.0, 3)],
)
def test_what_is_softened_unless_the_plan_says_otherwise(
    uppermost: bool, depth: int, given: float | None, temperature: float
) -> None:
    cut = replace(NORMALISED[0], uppermost=uppermost, depth=depth)
    batch = problem(cut)()
    one, other = (build_dni(cut, DNIPlan(temperature=said), seed=0) for said in (given, temperature))
    for dni in (one, other):
        dni.learn(*batch, batch=0)
    assert torch.equal(one.predict(*batch[:2]), other.predict(*batch[:2]))


def test_another_loss_is_not_softened() -> None:
    cut = replace(NORMALISED[1], uppermost=True, depth=2)
    batch = problem(cut)()
    dnis = [build_dni(cut, DNIPlan(temperature=temperature), seed=0) for temperature in (None, 1.0, 4.0)]
    for dni in dnis:
        dni.learn(*batch, batch=0)
    assert all(torch.equal(dnis[0].predict(*batch[:2]), dni.predict(*batch[:2])) for dni in dnis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_short_way_to_adam_gives_the_numbers_of_the_long_one(dtype: torch.dtype) -> None:
    """Weights and state, to the last bit; a parameter that has no gradient stays as it is."""
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 3), (3,), (2,)
    mine = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    short, long = _Adam(mine, lr=1e-2, fused=True), torch.optim.Adam(theirs, lr=1e-2, fused=True)
    for step in range(5):
        for a, b in zip(mine[: 2 + step % 2], theirs[: 2 + step % 2], strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=dtype)
            b.grad = a.grad.clone()
        short.step()
        long.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    torch.testing.assert_close(short.state_dict()["state"], long.state_dict()["state"], rtol=0, atol=0)


def test_a_loss_that_is_not_finite_is_found_by_a_loss_model_too() -> None:
    dni = build_dni(replace(CLASSIFIER, loss=lambda output, labels: output.sum() / 0), DNIPlan(), seed=0)
    h, labels, _ = problem(CLASSIFIER)()
    with pytest.raises(FloatingPointError, match="or look at the loss, which a loss_model computes too"):
        dni.meet(h, labels, batch=0)


def test_a_loss_model_reads_a_single_feature() -> None:
    """Normalised over itself it would be a constant, without a gradient."""
    dni, _ = trained(changed(REGRESSION, activation=(ROWS, 1)), 20, form="loss_model")
    h, labels, _ = problem(changed(REGRESSION, activation=(ROWS, 1)))()
    assert dni.predict(h, labels).any()


@pytest.mark.parametrize("cut", [CLASSIFIER, TOKENS])
def test_a_loss_model_asks_no_stage_for_larger_activations(cut: Cut) -> None:
    """Row by row its loss does not see how large h is, so its gradient is at right angles to h."""
    dni, _ = trained(cut, 20, form="loss_model")
    h, labels, _ = problem(cut)()
    prediction = dni.predict(h, labels)
    along = (prediction * h).sum(-1).abs().max()
    assert along < 1e-3 * prediction.norm() * h.norm() / len(h.flatten(0, -2))


def test_label_residual_by_hand() -> None:
    dni, _ = trained(CLASSIFIER, 50, form="label_residual")
    h, labels, _ = problem(CLASSIFIER)()
    weights = dni.form.state_dict()
    residual = (h @ weights["local.weight"].T + weights["local.bias"]).softmax(1) - F.one_hot(labels, CLASSES)
    expected = weights["scale"] * residual @ weights["back"]
    torch.testing.assert_close(dni.predict(h, labels), expected / max(1.0, rms(expected)) * dni.sigma)


@pytest.mark.parametrize("cut", [CLASSIFIER, TOKENS, MANY_CLASSES])
def test_label_residual_is_as_large_as_fits_its_targets(cut: Cut) -> None:
    """Of all multiples of R A, that which was nearest to the targets: a = <T, R A> / <R A, R A>."""
    dni, batch = build_dni(cut, DNIPlan(form="label_residual"), seed=0), problem(cut)
    fits = size = 0.0
    for _ in range(30):
        h, labels, g = batch()
        with torch.no_grad():
            unscaled = (dni.form._residual(h, labels) @ dni.form.back).reshape(g.shape)
        dni.form.gradients(h, labels, g, torch.ones(()))
        fits = 0.95 * fits + float((unscaled * g).sum())
        size = 0.95 * size + float(unscaled.square().sum())
        assert float(dni.form.scale) == pytest.approx(max(1e-3, fits / size) if size else 1.0, rel=1e-3)
        dni.optimizers[-1].step()


@pytest.mark.parametrize("cut", [CLASSIFIER, TOKENS, MANY_CLASSES])
def test_label_residual_has_the_gradients_autograd_gives(cut: Cut) -> None:
    """Of both its parts, whichever way the products are ordered: with few classes for its rows and with many."""
    dni, _ = trained(cut, 30, form="label_residual")
    h, labels, g = problem(cut)()
    labels.view(-1)[:3] = -100
    target, flat = torch.randn_like(g), labels.flatten()
    prediction, size = dni.form.meet(h, labels, torch.ones(()), slice(0, len(h)))
    scale = dni.form.scale.clone()
    expected = dni.form(h, labels).detach()
    dni.form.gradients(h, labels, target, dni.sigma)

    weight, bias, back = (parameter.detach().requires_grad_() for parameter in _parts(dni))
    outputs = h.flatten(0, -2) @ weight.T + bias
    onehot = F.one_hot(flat.clamp(min=0), outputs.shape[1])
    residual = (outputs.softmax(1).detach() - onehot) * (flat >= 0)[:, None]
    unscaled = (residual @ back).reshape(h.shape)
    own = F.cross_entropy(outputs, flat, reduction="sum") / len(flat)
    gradients = torch.autograd.grad(own + F.mse_loss(unscaled, target), (weight, bias, back))
    torch.testing.assert_close(expected, scale * unscaled.detach())
    torch.testing.assert_close(size, expected.square().mean().sqrt())
    torch.testing.assert_close(prediction, expected / size.clamp(min=1))
    for parameter, right in zip(_parts(dni), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, right)


@pytest.mark.parametrize("form", ["label_residual", "loss_model"])
def test_what_needs_no_gradient_is_learned_when_the_batch_is_met(form: str) -> None:
    """The rest waits for the target, so a target that is late is all that can be late."""
    dni, _ = trained(CLASSIFIER, 3, form=form)
    h, labels, g = problem(CLASSIFIER)()
    own = {id(parameter) for parameter in dni.form.own_parameters()}

    def changed(action: Callable[[], object]) -> set[int]:
        before = {id(p): p.detach().clone() for p in dni.form.parameters()}
        action()
        return {id(p) for p in dni.form.parameters() if not torch.equal(p, before[id(p)])}

    assert changed(lambda: dni.predict(h, labels)) == set()
    assert changed(lambda: dni.meet(h, labels, batch=3)) == own
    assert changed(lambda: dni.learn(h, labels, g, batch=3)) == {id(p) for p in dni.form.taught_parameters()}


def test_a_batch_that_is_met_is_predicted_by_what_was_known_before() -> None:
    dni, _ = trained(CLASSIFIER, 3)
    h, labels, _ = problem(CLASSIFIER)()
    expected = dni.predict(h, labels)
    torch.testing.assert_close(dni.meet(h, labels, batch=3), expected)
    assert not torch.equal(dni.predict(h, labels), expected)


@pytest.mark.parametrize("form", ["linear", "label_residual"])
def test_ignored_labels_teach_no_class(form: str) -> None:
    dni, batch = build_dni(TOKENS, DNIPlan(form=form), seed=0), problem(TOKENS)
    h, labels, g = batch()
    dni.learn(h, torch.full_like(labels, -100), g, batch=0)
    assert torch.isfinite(dni.predict(h, labels)).all()


def test_a_users_own_module() -> None:
    class Own(nn.Module):
        def __init__(self, cut: Cut) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(cut.features))

        def forward(self, h: Tensor, labels: Tensor) -> Tensor:
            return self.scale * h

    _, errors = trained(REGRESSION, 100, factory=Own, lr=1e-2)
    assert errors[0] == 1.0
    assert errors[-1] < 1.0
    assert describe_form(REGRESSION, DNIPlan(factory=Own))[0] == "factory"
    wrong = build_dni(REGRESSION, DNIPlan(factory=lambda cut: Pick()), seed=0)
    with pytest.raises(ValueError, match=r"Pick, from the DNI factory, gave \[32\] for an activation \[32, 12\]"):
        wrong.learn(*problem(REGRESSION)(), batch=0)


class Pick(nn.Module):
    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return h[:, 0]


# Which rows, when, and what is left alone


def test_trains_on_a_fraction_of_the_rows_that_follows_from_the_batch() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, h: Tensor, labels: Tensor) -> Tensor:
            seen.append(h[:, 0])
            return torch.zeros_like(h)

    plan = DNIPlan(factory=lambda cut: Spy(), rows=0.25)
    sample = problem(CLASSIFIER)()
    for batches in ((0, 2), (5, 2)):
        dni = build_dni(CLASSIFIER, plan, seed=0)
        for index in batches:
            dni.learn(*sample, batch=index)
    assert [len(rows) for rows in seen] == [ROWS // 4] * 4
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


class _Same(nn.Module):
    """Gives h itself."""

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return h


def test_a_users_module_may_give_the_activation_itself() -> None:
    """Predictions are clipped in place; the activation, which travels, must not be."""
    dni = build_dni(REGRESSION, DNIPlan(factory=lambda cut: _Same()), seed=0)
    h, labels, g = problem(REGRESSION)()
    dni.learn(h, labels, g, batch=0)
    before = h.clone()
    for prediction in (dni.predict(h, labels), dni.meet(h, labels, 1)):
        assert not torch.equal(prediction, h)
        assert torch.equal(h, before)


@pytest.mark.parametrize(("form", "samples"), [("label_residual", 2), ("loss_model", 2)])
def test_the_cheap_forms_train_on_some_rows_only(form: str, samples: int) -> None:
    cut = changed(TOKENS, activation=(32, 64, 4), labels=(32, 64), output=(32, 64, CLASSES))
    dni, seen = build_dni(cut, DNIPlan(form=form), seed=0), []
    gradients = dni.form.gradients
    dni.form.gradients = lambda h, *rest: (seen.append(h.shape), gradients(h, *rest))[1]
    dni.learn(*problem(cut)(), batch=0)
    assert seen == [(samples, 64, 4)]


@pytest.mark.parametrize(("cut", "form", "every"), [(CLASSIFIER, "auto", 4), (TOKENS, "auto", 4), (TOKENS, "mlp", 1)])
def test_how_often_a_target_flows_is_the_forms_wish_or_the_plans(cut: Cut, form: str, every: int) -> None:
    assert target_every([cut, cut], DNIPlan(form=form)) == every
    assert target_every([cut], DNIPlan(form=form, every=3)) == 3


def test_the_cut_that_wants_targets_most_often_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = {2: "mlp"}
    monkeypatch.setattr(
        "pipeline.dni.dni.describe_form", lambda cut, plan: (forms.get(cut.index, "label_residual"), "")
    )
    assert target_every([CLASSIFIER, replace(CLASSIFIER, index=2)], DNIPlan()) == 1
    assert target_every([], DNIPlan()) == 1


@pytest.mark.parametrize("form", ["linear", "mlp", "label_residual", "loss_model"])
def test_same_seed_same_numbers_and_the_global_generator_is_untouched(form: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, errors = trained(CLASSIFIER, 5, form=form, rows=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two, same_errors = trained(CLASSIFIER, 5, form=form, rows=0.5)
    assert errors == same_errors
    assert_same_state(one.state(), two.state())


def test_cuts_and_seeds_start_from_different_weights() -> None:
    plan = DNIPlan(form="loss_model")
    places = ((CLASSIFIER, 0), (CLASSIFIER, 1), (replace(CLASSIFIER, index=2), 0))
    dnis = [build_dni(cut, plan, seed) for cut, seed in places]
    firsts = {dni.form.head.body.weight.flatten()[0].item() for dni in dnis}
    assert len(firsts) == 3


@pytest.mark.parametrize("form", ["linear", "mlp", "label_residual", "loss_model"])
def test_what_takes_up_a_state_predicts_and_learns_as_the_first_would_have(form: str) -> None:
    """Weights alone would not do: sigma, the number of targets and the optimizers' moments belong to it."""
    one, _ = trained(CLASSIFIER, 20, form=form)
    two = build_dni(CLASSIFIER, DNIPlan(form=form), seed=0)
    two.load_state(one.state())
    batch = problem(CLASSIFIER)
    for index in range(20, 25):
        h, labels, g = batch()
        assert torch.equal(two.meet(h, labels, index), one.meet(h, labels, index))
        assert two.learn(h, labels, g, index) is one.learn(h, labels, g, index) is True
    assert_same_state(two.state(), one.state())


def test_a_state_is_a_copy() -> None:
    dni, _ = trained(CLASSIFIER, 3)
    kept, (h, labels, g) = dni.state(), problem(CLASSIFIER)()
    before = copy.deepcopy(kept)
    dni.meet(h, labels, batch=3)
    dni.learn(h, labels, g, batch=3)
    assert_same_state(kept, before)


# What it refuses


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_target_that_is_not_finite_raises_and_changes_nothing(poison: float) -> None:
    dni, _ = trained(CLASSIFIER, 3)
    before = dni.state()
    h, labels, g = problem(CLASSIFIER)()
    g[0, 0] = poison
    with pytest.raises(FloatingPointError, match="cut 1, after 3 targets, got a target for batch 9 that is"):
        dni.learn(h, labels, g, batch=9)
    assert_same_state(dni.state(), before)


def test_a_prediction_that_is_not_finite_raises() -> None:
    dni, _ = trained(CLASSIFIER, 3)
    h, labels, _ = problem(CLASSIFIER)()
    with pytest.raises(FloatingPointError, match="cut 1, after 3 targets, predicted a gradient that is not finite"):
        dni.predict(h * float("nan"), labels)


@pytest.mark.parametrize(
    ("cut", "form", "sentence"),
    [
        (
            REGRESSION,
            "label_residual",
            "labels [32, 3] torch.float32 are no classes of an output [32, 3]; choose",
        ),
        (
            PIXELS,
            "label_residual",
            "[32, 12, 12] torch.int64 are not one class per row of the activation",
        ),
        (
            CLASSIFIER,
            "conv",
            "the activation is [32, 12], not [batch, channels, height, width]; choose",
        ),
        (PIXELS, "conv", "labels [32, 12, 12] torch.int64 are not one class per sample; choose loss_model."),
        (CLASSIFIER, "linaer", "unknown DNI form 'linaer'; did you mean 'linear'?"),
        (
            changed(CLASSIFIER, dtype=torch.int64),
            "linear",
            "the activation at cut 1 is torch.int64: only floating-point numbers have a gradient",
        ),
    ],
)
def test_a_form_that_does_not_fit_is_refused_with_the_remedy(cut: Cut, form: str, sentence: str) -> None:
    for ask in (lambda plan: describe_form(cut, plan), lambda plan: build_dni(cut, plan, seed=0)):
        with pytest.raises(PlanError) as refusal:
            ask(DNIPlan(form=form))
        assert sentence in str(refusal.value)


def test_a_plan_names_the_forms_of_the_table_and_a_form_says_what_it_reads() -> None:
    assert ("auto", *FORMS) == (*DNI_FORMS, "factory")
    readers = {name: [form.name for form in FORMS.values() if name in form.reads] for name in ("hidden", "labels")}
    assert readers == {"hidden": ["mlp", "conv", "loss_model"], "labels": ["linear", "mlp", "conv"]}
    assert all(hasattr(DNIPlan(), option) for form in FORMS.values() for option in form.reads)


@pytest.mark.parametrize("cut", [CLASSIFIER, IMAGES, REGRESSION, TOKENS, PIXELS])
def test_auto_takes_the_loss_model_and_says_why(cut: Cut) -> None:
    chosen, reason = describe_form(cut, DNIPlan())
    assert chosen == "loss_model"
    assert reason
    assert isinstance(build_dni(cut, DNIPlan(), seed=0), DNI)


def test_what_a_cut_knows() -> None:
    assert (CLASSIFIER.classes, TOKENS.classes, PIXELS.classes, REGRESSION.classes) == (5, 5, 5, None)
    assert (CLASSIFIER.per_token, TOKENS.per_token, PIXELS.per_token) == (False, True, False)
    assert (IMAGES.features, TOKENS.features) == (3 * 6 * 6, WIDTH)
    assert (IMAGES.rows_per_sample, TOKENS.rows_per_sample) == (1, 6)
