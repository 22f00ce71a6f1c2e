"""What the replicas of one stage average, and when: the column ``averages`` of the table of modes.

    gradients   F B [give, wait, take] S F B ...        exact: every step is made with the mean over all replicas
    weights     F B S F B S [give] F B S [take] F B S   off the critical path: nobody waits, until the end

**Gradients.** Locked training with R replicas equals single-process training on the R batches together, but for the
rounding of sums in another order. BatchNorm sees its replica's batch alone; replica 0's running statistics are kept.

**Weights.** Every n steps a replica gives a snapshot of its weights and goes on. When the snapshots of all are there it
adds (mean of the snapshots - own snapshot) to its weights, so that the updates it made meanwhile are kept. Without
delay this is local SGD (Stich 2019); with delay it is CoCoD-SGD (Shen et al. 2019, "Faster Distributed Deep Net
Training: Computation and Communication Decoupled Stochastic Gradient Descent"). There is one round at a time: a second
snapshot before the first correction would carry the same difference twice; one that falls due meanwhile is given when
the round is over. After its last batch every replica waits for the last weights of all and takes their mean, running
statistics of floating point included. The state of the optimizer and the DNI are each replica's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pipeline.metrics.spans import Recorder, Span, silent
from pipeline.plan.plan import Plan
from pipeline.replicas.all_gather import AllGather, Packing
from pipeline.schedule.modes import MODES
from pipeline.state import State, attributes, set_attributes

__all__ = ["ALONE", "Averager", "GradientAverager", "WeightAverager", "averager_of", "share_bytes"]

_SLACK_BYTES = 2048  # of a message: header, alignment of one vector per dtype

Asked = Callable[[], bool]
"""Whether somebody asked the run to end before its last batch."""


class Averager:
    """What a runner asks of the averaging of its stage, answered for a stage that has no replicas. Nothing blocks."""

    def __init__(self, asked: Asked = lambda: False) -> None:
        self._asked = asked

    @property
    def held(self) -> bool:
        """Whether the stage may do nothing but take the average."""
        return False

    @property
    def ready(self) -> bool:
        """Whether the average can be taken."""
        return False

    def poll(self) -> None:
        """Look into the queues."""

    def before_step(self) -> bool:
        """The gradients of a batch are there. Whether the step has to wait for an average."""
        return False

    def after_step(self) -> None:
        """A step was made."""

    def after_training(self) -> None:
        """The last step was made."""

    def take(self) -> bool:
        """Take the average that is ready. Whether the step that waited for it is now to be made."""
        raise AssertionError("there is no average")

    def enough(self, step: int) -> bool:
        """Whether the first stage takes no batch for this step, nor for any after it: as soon as somebody asked."""
        return self._asked()

    def state(self) -> State:
        """What is remembered between two batches."""
        return {}

    def load_state(self, state: State) -> None:
        """Take up what ``state`` gave."""


ALONE = Averager()


class _Replica(Averager):
    """The averaging of a stage that has replicas; see ``averager_of``."""

    def __init__(self, tensors: Mapping[str, Tensor], exchange: AllGather, asked: Asked, record: Recorder) -> None:
        super().__init__(asked)
        trained = (t for t in tensors.values() if isinstance(t, nn.Parameter) and t.requires_grad)
        self._parameters = list({id(parameter): parameter for parameter in trained}.values())
        self._packing = Packing(self._parameters)
        self._exchange, self._record = exchange, record
        self._steps = 0

    @property
    def ready(self) -> bool:
        return self._exchange.ready

    def poll(self) -> None:
        self._exchange.poll()


class GradientAverager(_Replica):
    """Every step is made with the mean of the gradients of all replicas, or with their sum where stages share weights.

    A parameter without a gradient counts as zeros where another replica has one; where none has, it keeps none. A wish
    to end early travels with the gradients, and by then the next batch may have been taken: all end after it.
    """

    _end: int | None = None
    adds_up = False

    @property
    def held(self) -> bool:
        return self._exchange.open

    def before_step(self) -> bool:
        self._record(Span.AVERAGE, self._steps)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        marks = [p.grad is not None for p in self._parameters]
        self._exchange.offer((*self._packing.packed(gradients), torch.tensor([*marks, self._asked()])))
        return True

    def take(self) -> bool:
        self._record(Span.AVERAGE, self._steps)
        shares = self._exchange.shares()
        *there, asked = torch.stack([marks.cpu() for *_, marks in shares]).any(0).tolist()
        means = self._packing.unpacked(_mean([vectors for *vectors, _ in shares], 1 if self.adds_up else len(shares)))
        for parameter, mean, given in zip(self._parameters, means, there, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(mean)
            elif given:
                parameter.grad = mean.clone()
        self._steps += 1
        if asked and self._end is None:
            self._end = self._steps + 1
        return True

    def enough(self, step: int) -> bool:
        return self._end is not None and step >= self._end

    def state(self) -> State:
        return attributes(self, ("_steps", "_end")) | {"round": self._exchange.round}

    def load_state(self, state: State) -> None:
        set_attributes(self, ("_steps", "_end"), state)
        self._exchange.round = state["round"]


class WeightAverager(_Replica):
    """Weights are averaged every n steps (``every``), off the critical path, and at the end."""

    def __init__(
        self, tensors: Mapping[str, Tensor], exchange: AllGather, asked: Asked, record: Recorder, every: int
    ) -> None:
        super().__init__(tensors, exchange, asked, record)
        buffers = {id(t): t for t in tensors.values() if not isinstance(t, nn.Parameter) and t.is_floating_point()}
        self._state: list[Tensor] = [*self._parameters, *buffers.values()]
        self._whole = Packing(self._state)
        self._every, self._since = every, 0
        self._snapshot: tuple[Tensor, ...] = ()
        self._at_the_end = False

    @property
    def held(self) -> bool:
        return self._at_the_end and self._exchange.open

    def after_step(self) -> None:
        self._steps, self._since = self._steps + 1, self._since + 1
        if self._since >= self._every and not self._exchange.open:
            self._record(Span.AVERAGE, self._steps)
            self._since, self._snapshot = 0, self._packing.packed(self._parameters)
            self._exchange.offer(self._snapshot)

    def after_training(self) -> None:
        self._record(Span.AVERAGE, self._steps)
        self._at_the_end = True
        self._exchange.offer(self._whole.packed(self._state), last=True)

    @torch.no_grad()
    def take(self) -> bool:
        """Add (mean - own snapshot) to the weights; at the end take the mean for them."""
        self._record(Span.AVERAGE, self._steps)
        mean = _mean([list(share) for share in self._exchange.shares()])
        if self._at_the_end:
            for tensor, value in zip(self._state, self._whole.unpacked(mean), strict=True):
                tensor.copy_(value)
            return False
        correction = tuple(torch.sub(m, own, out=m) for m, own in zip(mean, self._snapshot, strict=True))
        for parameter, value in zip(self._parameters, self._packing.unpacked(correction), strict=True):
            parameter.add_(value)
        return False

    def state(self) -> State:
        """Steps made, and since the last snapshot; a round that is open is given up, and its snapshot due again."""
        due = max(self._since, self._every) if self._exchange.open else self._since
        return {"steps": self._steps, "since": due, "round": self._exchange.round}

    def load_state(self, state: State) -> None:
        self._steps, self._since, self._exchange.round = state["steps"], state["since"], state["round"]


def averager_of(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    exchange: AllGather,
    asked: Asked = lambda: False,
    record: Recorder = silent,
) -> Averager:
    """The averaging of one stage of one replica, as the plan's mode says.

    ``tensors`` are the stage's parameters and buffers; ``record`` is told when the worker turns to averaging.
    """
    if plan.ties is not None:
        shared = ([tensors[name] for name in names if name in tensors] for names in plan.ties.names)
        tensors = {str(place): copies[0] for place, copies in enumerate(shared) if copies}
    if (plan.ties is not None and not tensors) or (plan.ties is None and plan.replicas == 1):
        return Averager(asked)
    if MODES[plan.mode].averages == "gradients":
        averager = GradientAverager(tensors, exchange, asked, record)
        averager.adds_up = plan.ties is not None
        return averager
    return WeightAverager(tensors, exchange, asked, record, plan.average_every)


def share_bytes(state_bytes: int) -> int:
    """Bytes of the largest message, encoded; ``state_bytes`` are those of parameters and buffers, plus one for each."""
    return state_bytes + _SLACK_BYTES


def _mean(shares: list[list[Tensor]], count: int | None = None) -> tuple[Tensor, ...]:
    """Of vectors, one by one, added up in the order of the replicas and divided by their ``count``."""
    means = []
    for first, *others in zip(*shares, strict=True):
        total = first.clone()
        for other in others:
            total += other
        means.append(total.div_(count or len(shares)))
    return tuple(means)
