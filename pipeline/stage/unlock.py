"""When a stage is locked, and how that travels: ``warmup_steps`` and ``unlock auto``.

What is locked is a cut. While cut k is, stage k waits with every batch for the gradient from above, and its DNI learns
without being used. The stage decides when a batch comes in, and tells the stage above with the activation (AWAITED);
that one then sends the gradient of the whole batch as soon as it has it, from whatever it updates with itself:

    warm-up of 2       k=0  F0 .  .  .  .  B0 F1 .  .  .  .  B1 F2 U2 F3 U3    all cuts locked: mode naive, bit for bit
    batches            k=1  .  F0 .  .  B0 .  .  F1 .  .  B1 .  .  F2 U2 F3
                       k=2  .  .  F0 U0 .  .  .  .  F1 U1 .  .  .  .  F2 U2

    cut 0 locked,      k=0  F0 .  .  B0 F1 .  .  B1           waits for stage 1 alone: J^T s is sent at U0
    cut 1 not          k=1  .  F0 U0 .  .  F1 U1
                       k=2  .  .  F0 U0 .  .  F1 U1

    cut 1 locked,      k=0  F0 U0 F1 U1 F2 U2 F3 U3           goes on, as far as there is room in the queue
    cut 0 not          k=1  .  F0 .  B0 F1 .  B1 F2           J^T g is sent at B0: so DNI 0 gets a true gradient
                       k=2  .  .  F0 U0 .  F1 U1

So stages joined by locked cuts are one module of Jaderberg et al. 2017 (section 2), whose uppermost cut has the DNI in
use.

``auto`` begins locked. The true gradient of every ``quality_every``-th batch travels all the way down, locked or not,
and each stage compares the gradients of its weights under s and under g (``pipeline.stage.dni_quality``). Over the
last 3 samples since the last switch, with c the mean cosine and r the geometric mean of the ratio of norms:

    unlocks when  c >= C      and  1e-4 <= r <= 10         C = unlock_cosine
    locks when    c <  C / 3  or   r outside 5e-5 .. 20    between the two it stays as it is

Small ratios are let pass: Adam does not see them, and label_residual predicts too small gradients in runs that end
well. A batch keeps the state it came in with. In the reference driver decisions repeat exactly; in processes a sample
comes when it comes, so ``deterministic`` runs refuse ``auto``, but not a warm-up.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import astuple, dataclass

from pipeline.plan.plan import Plan
from pipeline.stage.dni_quality import Quality
from pipeline.state import State

__all__ = ["Lock", "Switch"]

_SAMPLES = 3
_HYSTERESIS = 3.0  # of the cosine
_LEAST_RATIO, _MOST_RATIO, _RATIO_HYSTERESIS = 1e-4, 10.0, 2.0


@dataclass(frozen=True)
class Switch:
    """A stage locks or unlocks."""

    stage: int
    batch: int  # the first that it concerns
    locked: bool  # what the stage is from then on
    cosine: float | None = None  # mean of the samples that led to it; None at the end of a warm-up
    norm_ratio: float | None = None  # their geometric mean; None likewise


class Lock:
    """Says of every batch whether a stage waits for its gradient."""

    def __init__(self, plan: Plan, stage: int) -> None:
        self._plan, self._stage = plan, stage
        self._auto = plan.unlock == "auto"
        self._has_dni = plan.unlocked and stage < plan.stages - 1
        self.locked = self._has_dni and (self._auto or plan.warmup_steps > 0)
        self._samples: deque[Quality] = deque(maxlen=_SAMPLES)
        self._switch: Switch | None = None

    def judged(self, quality: Quality) -> None:
        """Take in how good the DNI was in a sampled batch."""
        self._samples.append(quality)

    def decide(self, batch: int) -> bool:
        """Whether the stage waits for the gradient of this batch, which comes in now."""
        if not self._has_dni or batch < self._plan.warmup_steps:
            return self.locked
        if not self._auto:
            if self.locked:
                self._turn(batch)
        elif len(self._samples) == _SAMPLES:
            cosine = sum(sample.cosine for sample in self._samples) / _SAMPLES
            ratios = [sample.norm_ratio for sample in self._samples]
            ratio = math.exp(sum(map(math.log, ratios)) / _SAMPLES) if min(ratios) > 0 else 0.0
            least, slack = self._plan.unlock_cosine, 1.0
            if not self.locked:
                least, slack = least / _HYSTERESIS, _RATIO_HYSTERESIS
            good = cosine >= least and _LEAST_RATIO / slack <= ratio <= _MOST_RATIO * slack
            if good is self.locked:
                self._turn(batch, cosine, ratio)
        return self.locked

    def switched(self) -> Switch | None:
        """The switch that the last decision was, if it was one; gives it once."""
        switch, self._switch = self._switch, None
        return switch

    def state(self) -> State:
        return {"locked": self.locked, "samples": [list(astuple(sample)) for sample in self._samples]}

    def load_state(self, state: State) -> None:
        self.locked = state["locked"]
        self._samples = deque((Quality(*sample) for sample in state["samples"]), _SAMPLES)

    def _turn(self, batch: int, cosine: float | None = None, norm_ratio: float | None = None) -> None:
        self.locked = not self.locked
        self._switch = Switch(self._stage, batch, self.locked, cosine, norm_ratio)
        self._samples.clear()
