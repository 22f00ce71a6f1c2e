"""The Decoupled Neural Interface of a cut: predicts the gradient to come, and learns from it.

    h, labels --> form --> clip to RMS 1 --> * sigma --> s            predict
    h, labels --> what the form learns without g --> Adam             meet, with the same forward pass as predict
    g --> sigma,  g / sigma --> the form's objective --> Adam         learn

Gradients are tiny and their scale drifts, so a form (forms.py) sees them in units of sigma, their running root mean
square. Without that and the clip, unlocked training diverged in every trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.dni.forms import Activation, Form, Labels, Scalar, root_mean_square
from pipeline.dni.label_residual import LabelResidual
from pipeline.dni.loss_model import LossModel
from pipeline.dni.regressors import MLP, Conv, Custom, Linear
from pipeline.dni.row_window import RowSubsample
from pipeline.errors import PlanError, nearest
from pipeline.messages.bundle import rows_in
from pipeline.model.cut import Cut
from pipeline.plan.names import DNI_FORMS
from pipeline.plan.plan import DNIPlan
from pipeline.seeding import seeded
from pipeline.state import State, load_module, module_state, plain

__all__ = ["DNI", "FORMS", "build_dni", "describe_form", "target_every", "training_window"]

FORMS: dict[str, type[Form]] = {form.name: form for form in (Linear, MLP, Conv, LabelResidual, LossModel, Custom)}
"""All forms by name; a plan names them (``plan.names.DNI_FORMS``), but for a user's own, which is given."""

_DECAY = 0.99  # of sigma: it averages over the last 100 targets or so
_TINY = 1e-30


class DNI(nn.Module):
    """One form with what all forms share: the unit sigma, the clip, the window of samples, the optimizer.

    The samples to train on follow from (seed, cut, batch). Works in float32, or in float64 where the activation does.
    """

    mean_square: Tensor
    weight: Tensor
    unit: Tensor

    def __init__(self, form: Form, cut: Cut, plan: DNIPlan, seed: int) -> None:
        super().__init__()
        self._dtype = torch.float64 if cut.activation.dtype == torch.float64 else torch.float32
        self.form = form.to(self._dtype)
        self._index = cut.index
        self.window = training_window(cut, plan, seed)
        self._num_targets = 0
        self.register_buffer("mean_square", torch.zeros((), dtype=self._dtype))
        self.register_buffer("weight", torch.zeros((), dtype=self._dtype))
        self.register_buffer("unit", torch.ones((), dtype=self._dtype))  # sigma, or 1 while nothing is known of it
        self._own_optimizer = _adam(form.own_parameters(), plan.lr)
        self._optimizer = _adam(form.taught_parameters(), plan.lr)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam of what learns at once, and of what learns from targets, as far as there is something to train."""
        return [optimizer for optimizer in (self._own_optimizer, self._optimizer) if optimizer is not None]

    @property
    def sigma(self) -> Scalar:
        """Running root mean square of the true gradient, bias-corrected; 0 until the first target came."""
        return (self.mean_square / self.weight.clamp(min=_TINY)).sqrt()

    def predict(self, h: Activation, labels: Labels) -> Activation:
        """The synthetic gradient dL/dh of one batch, detached, its root mean square at most ``sigma``.

        Zeros until the first target came. Waits for the device once, to see that the prediction is finite.

        Raises:
            FloatingPointError: the prediction is not finite.
        """
        if self._num_targets == 0:
            return torch.zeros_like(h)
        with torch.no_grad():
            return self._checked(*self.form.clipped(h.detach().to(self._dtype), labels, self.unit), h)

    def meet(self, h: Activation, labels: Labels, batch: int) -> Activation:
        """What ``predict`` gives for a batch that the stage has just computed; learns what needs no gradient to come.

        Raises:
            FloatingPointError: the prediction is not finite; the DNI is then unchanged.
        """
        with torch.no_grad():
            samples = self.window.of(batch)
            prediction = self._checked(*self.form.meet(h.detach().to(self._dtype), labels, self.unit, samples), h)
        if self._own_optimizer is not None:
            self._own_optimizer.step()
        return prediction if self._num_targets else torch.zeros_like(h)

    def relative_error(self, h: Activation, labels: Labels, g: Activation) -> Scalar:
        """|s - g|^2 / |g|^2 of the prediction s for (h, labels): 1 is no better than zeros."""
        error: Tensor = torch.linalg.vector_norm(self.predict(h, labels) - g)
        relative: Tensor = error / torch.linalg.vector_norm(g).clamp(min=_TINY)
        return relative.square()

    def learn(self, h: Activation, labels: Labels, g: Tensor, batch: int) -> bool:
        """Take the gradient ``g`` that came back for a batch, true or bootstrapped, as the target of (h, labels).

        It is that of all samples, or of those in the window alone. Waits for the device once, to see that it is finite.

        Returns:
            Whether there was a training step: not when the target is all zeros and none came before (under bootstrap,
            the DNI above knows nothing yet).

        Raises:
            FloatingPointError: the target is not finite; the DNI is then unchanged.
        """
        samples = self.window.of(batch)
        g = (g[samples] if len(g) == len(h) else g).detach().to(self._dtype)
        size = root_mean_square(g)
        self._check(size, f"got a target for batch {batch}", "lower the learning rate, or look at the loss above")
        if self._num_targets == 0 and not size:
            return False
        self.mean_square.lerp_(size.square(), 1 - _DECAY)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - _DECAY)
        self._num_targets += 1
        self.unit.copy_(self.sigma.clamp(min=_TINY))
        self.form.gradients(h[samples].detach().to(self._dtype), rows_in(labels, samples), g / self.unit, self.unit)
        if self._optimizer is not None:
            self._optimizer.step()
        return True

    def state(self) -> State:
        optimizers = [plain(optimizer.state_dict()) for optimizer in self.optimizers]
        return {"module": module_state(self), "num_targets": self._num_targets, "optimizers": optimizers}

    def load_state(self, state: State) -> None:
        load_module(self, state["module"])
        self._num_targets = state["num_targets"]
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(plain(kept))

    def _checked(self, prediction: Tensor, size: Tensor, h: Tensor) -> Tensor:
        remedy = "lower the DNI's lr, or look at the loss, which a loss_model computes too"
        self._check(size, "predicted a gradient", remedy)
        return prediction.to(h.dtype)

    def _check(self, size: Tensor, what: str, remedy: str) -> None:
        if not math.isfinite(float(size)):
            where = f"the DNI at cut {self._index}, after {self._num_targets} targets,"
            raise FloatingPointError(f"{where} {what} that is not finite: {remedy}.")


class _Adam(torch.optim.Adam):
    """torch's fused Adam on few small parameters, where its kernel takes a tenth of the time of the Python around it.

    The same kernel, state and numbers (a test compares them), without hooks, profiler and grouping.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, with a ``.grad`` at every parameter that has ever had one."""
        (group,) = self.param_groups
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not trained or not all(parameter in self.state for parameter in trained):
            return super().step(closure)  # makes the state
        states = [self.state[parameter] for parameter in trained]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        gradients, (beta1, beta2) = [parameter.grad for parameter in trained], group["betas"]
        options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(trained, gradients, means, squares, [], steps, beta1=beta1, beta2=beta2, **options)
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps every step that does not say so


def _adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer | None:
    return _Adam(parameters, lr=lr, fused=True) if parameters else None


def build_dni(cut: Cut, plan: DNIPlan, seed: int) -> DNI:
    """The DNI of ``cut``; its weights depend on (seed, cut) alone. Raises as ``describe_form``."""
    form = _form_of(cut, plan)
    with seeded(seed, "dni", cut.index):
        return DNI(form(cut, plan), cut, plan, seed)


def training_window(cut: Cut, plan: DNIPlan, seed: int) -> RowSubsample:
    """The samples of a batch whose true gradient the DNI of ``cut`` trains on. Raises as ``describe_form``.

    The plan's fraction (``rows``), no more rows than the form wants, at least one sample.
    """
    most_rows, batch_size = _form_of(cut, plan).most_rows_at(cut), cut.activation.shape[0]
    size = math.ceil(plan.rows * batch_size)
    if most_rows is not None:
        size = min(size, most_rows // cut.rows_per_sample)
    return RowSubsample(seed, cut.index, batch_size, max(1, size))


def target_every(cuts: Sequence[Cut], plan: DNIPlan) -> int:
    """Of how many batches one gives a target: as planned, or as the form wants; the least where the cuts differ.

    Raises as ``describe_form``.
    """
    return plan.every or min((_form_of(cut, plan).every for cut in cuts), default=1)


def describe_form(cut: Cut, plan: DNIPlan) -> tuple[str, str]:
    """The name of the form the DNI of ``cut`` gets, and why, as half a sentence.

    Raises:
        PlanError: the form is unknown or does not fit the cut; the sentence says which to take.
    """
    if not cut.activation.dtype.is_floating_point:
        raise PlanError(
            f"the activation at cut {cut.index} is {cut.activation.dtype}: only floating-point numbers "
            "have a gradient; cut the network after a later layer."
        )
    if plan.factory is not None:
        return Custom.name, "the plan gives a factory"
    if plan.form not in DNI_FORMS:
        raise PlanError(nearest(plan.form, DNI_FORMS, "DNI form"))
    if plan.form == "auto":
        return LossModel.name, "it takes any loss and any activations, and learned best on the whole"
    if (misfit := FORMS[plan.form].misfit(cut)) is not None:
        raise PlanError(f"DNI form {plan.form} does not fit cut {cut.index}: {misfit}")
    return plan.form, "the plan says so"


def _form_of(cut: Cut, plan: DNIPlan) -> type[Form]:
    return FORMS[describe_form(cut, plan)[0]]
