"""The reference driver: all stages in one process on a virtual clock. Deterministic, exact, no real time.

It serves three ends: the truth that runs of processes are compared with, experiments with delays that no machine here
has, and, with phantoms in the place of tensors, the order of actions of a run that is to be repeated exactly.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.channels import narrowed, widened
from pipeline.loader import inputs, phantom_inputs
from pipeline.messages import Message
from pipeline.modes import MODES
from pipeline.plan import Plan
from pipeline.policies import Action
from pipeline.quality import Quality
from pipeline.recipe import Recipe
from pipeline.resolve import Resolved, resolve, stage_layers
from pipeline.runner import Runner, StageLike
from pipeline.scores import Scores
from pipeline.stage import Stage
from pipeline.targets import Flow

__all__ = ["Costs", "Event", "Reference", "run_reference", "schedule", "timeline"]


@dataclass(frozen=True)
class Costs:
    """Ticks of the virtual clock. One step of an unlocked stage, forward and update, is ``step`` ticks."""

    forward: int = 1
    backward: int = 2
    learn: int = 0

    def of(self, action: Action) -> int:
        """Ticks of one action."""
        return {Action.FORWARD: self.forward, Action.LEARN: self.learn, Action.SKIP: 0}.get(action, self.backward)

    def hop(self, steps: float) -> int:
        """Ticks of a hop of ``steps`` steps."""
        return round(steps * (self.forward + self.backward))


@dataclass(frozen=True)
class Event:
    """Stage ``stage`` did ``action`` from tick ``start`` to ``end``; ``batch`` counts that action on that stage."""

    stage: int
    action: Action
    batch: int
    start: int
    end: int


@dataclass
class Reference:
    """What a run of the reference driver gives.

    Attributes:
        resolved: what was run.
        stages: the trained stages.
        losses: training loss of every batch; fewer than planned where ``until`` ended the run.
        scores: (number of updates, scores) of every pass over the held-out batches.
        events: what every stage did when.
        qualities: of every stage below the last: its synthetic gradients of the sampled batches against the true ones.
    """

    resolved: Resolved
    stages: list[Stage]
    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, Scores]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    qualities: dict[int, list[Quality]] = field(default_factory=dict)

    @property
    def reached(self) -> int | None:
        """After how many updates ``until`` was met first; None: never, or not asked for."""
        goal = self.resolved.plan.goal
        if goal is None:
            return None
        return next((n for n, scores in self.scores if goal.met(scores.loss(), scores.accuracy())), None)

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers under the unsplit model's names."""
        return {name: t.detach() for stage in self.stages for name, t in stage.state_tensors().items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer states under the unsplit model's names."""
        return {name: t for stage in self.stages for name, t in stage.optimizer_tensors().items()}


def run_reference(recipe: Recipe, plan: Plan, costs: Costs | None = None) -> Reference:
    """Train in this process as the plan says; a hop takes ``plan.hop_steps``.

    Uses torch's current number of threads; processes use ``plan.threads``. With ``until``, no batch is taken once the
    last stage has met the goal; what is in the pipeline by then is finished.

    Raises:
        PlanError: recipe or plan cannot run.
        StageError: the work failed.
    """
    resolved = resolve(recipe, plan)
    plan = resolved.plan
    stages = [
        Stage(
            stage_layers(recipe, plan, k),
            k,
            plan,
            recipe,
            resolved.cuts[k] if k < plan.stages - 1 else None,
            resolved.cuts[k - 1] if k > 0 else None,
        )
        for k in range(plan.stages)
    ]
    result = Reference(resolved, stages)
    source = inputs(recipe, plan, resolved.steps, enough=lambda: result.reached is not None)
    result.events = _drive(cast(list[StageLike], stages), plan, source, costs or Costs(), result)
    return result


def schedule(plan: Plan, held_out_batches: int, costs: Costs | None = None) -> list[list[Action]]:
    """The order of actions of every stage, without computing anything."""
    events = timeline(plan, held_out_batches, costs or Costs())
    return [[event.action for event in events if event.stage == k] for k in range(plan.stages)]


def timeline(plan: Plan, held_out_batches: int, costs: Costs) -> list[Event]:
    """What every stage does when, on the virtual clock, without computing anything; in order of begin."""
    assert plan.steps is not None, "the plan is resolved"
    phantoms: list[StageLike] = [_Phantom(k, plan) for k in range(plan.stages)]
    return _drive(phantoms, plan, phantom_inputs(plan, plan.steps, held_out_batches), costs, None)


@dataclass
class _Clock:
    now: int = 0
    effect: int = 0  # when what is being done will be done
    alarms: list[int] = field(default_factory=list)

    def at(self, tick: int) -> None:
        heapq.heappush(self.alarms, tick)


@dataclass
class _Queue:
    """A queue in virtual time: what is put at the end of an action arrives a hop later."""

    clock: _Clock
    capacity: int
    hop: int
    wire_dtype: torch.dtype | None
    items: deque[tuple[int, Message]] = field(default_factory=deque)

    def room(self) -> bool:
        return len(self.items) < self.capacity

    def put(self, message: Message) -> None:
        sent = narrowed(message, self.wire_dtype)
        message = message if sent is message else widened(sent)
        copies = tuple(tensor.detach().clone() for tensor in message.tensors)
        arrival = self.clock.effect + self.hop
        self.items.append((arrival, replace(message, tensors=copies)))
        self.clock.at(arrival)

    def take(self) -> Message | None:
        if self.items and self.items[0][0] <= self.clock.now:
            return self.items.popleft()[1]
        return None


@dataclass
class _Source:
    messages: Iterator[Message]

    def take(self) -> Message | None:
        return next(self.messages, None)


def _drive(
    stages: list[StageLike], plan: Plan, source: Iterator[Message], costs: Costs, result: Reference | None
) -> list[Event]:
    clock = _Clock()
    runners = _connect(stages, plan, source, costs, clock)
    if result is not None:
        runners[-1].on_loss = lambda batch, loss: result.losses.append(loss)
        for k, runner in enumerate(runners):
            runner.on_quality = result.qualities.setdefault(k, []).append
        runners[-1].on_scores = lambda updates, scores: result.scores.append((updates, scores))
    busy_until = [0] * len(runners)
    counts: list[dict[Action, int]] = [{} for _ in runners]
    events: list[Event] = []
    while not all(runner.done for runner in runners):
        moved = False
        for k, runner in enumerate(runners):
            if runner.done or busy_until[k] > clock.now:
                continue
            clock.effect = clock.now
            runner.poll()
            if runner.done or (action := runner.next()) is Action.WAIT:
                moved |= runner.done
                continue
            clock.effect = busy_until[k] = clock.now + costs.of(action)
            runner.perform(action)
            clock.at(busy_until[k])
            batch = counts[k][action] = counts[k].get(action, -1) + 1
            events.append(Event(k, action, batch, clock.now, busy_until[k]))
            moved = True
        if not moved:
            _advance(clock, runners)
    return events


def _advance(clock: _Clock, runners: list[Runner]) -> None:
    while clock.alarms and clock.alarms[0] <= clock.now:
        heapq.heappop(clock.alarms)
    if not clock.alarms:
        views = "; ".join(f"stage {k} {runner.view()}" for k, runner in enumerate(runners) if not runner.done)
        raise RuntimeError(f"deadlock at tick {clock.now}: every stage waits. {views}")
    clock.now = heapq.heappop(clock.alarms)


def _connect(
    stages: list[StageLike], plan: Plan, source: Iterator[Message], costs: Costs, clock: _Clock
) -> list[Runner]:
    hop = costs.hop(plan.hop_steps)
    on_the_way = -(-hop // (costs.forward + costs.backward))  # what the link itself holds
    downs = [_Queue(clock, plan.channel.slots + on_the_way, hop, plan.wire_dtype) for _ in stages[1:]]
    ups = [
        _Queue(clock, plan.gradient_slots_at(k) + 2 * on_the_way * (plan.stages - k), hop, plan.wire_dtype)
        for k in range(len(stages) - 1)
    ]
    return [
        Runner(
            stage=stage,
            policy=MODES[plan.mode].policy,
            stages=plan.stages,
            microbatches=plan.microbatches,
            below=_Source(source) if k == 0 else downs[k - 1],
            above=None if stage.last else ups[k],
            down=None if stage.last else downs[k],
            up=None if k == 0 else ups[k - 1],
            ahead=_round_trips(plan, k, hop, costs) if plan.in_flight == "full" else None,
        )
        for k, stage in enumerate(stages)
    ]


def _round_trips(plan: Plan, k: int, hop: int, costs: Costs) -> int:
    """Batches that stage k begins while one goes to the last stage and comes back: a step a stage, two hops a cut."""
    step = costs.forward + costs.backward
    return (plan.stages - 1 - k) * -(-(step + 2 * hop) // step)


class _Phantom:
    """A stage that only says which gradients flow, as ``Stage`` would; its tensors are empty."""

    _EMPTY = torch.empty(0)

    def __init__(self, index: int, plan: Plan) -> None:
        self._flow = Flow(plan, index)
        self.index, self.last, self.scores = index, self._flow.last, Scores()
        self._updated = -1

    def updates(self, batch: int) -> bool:
        return self._flow.updates(batch)

    def forward(self, batch: int, x: Any, labels: Any, microbatch: int = 0) -> Tensor:
        return self._EMPTY

    def evaluate(self, batch: int, x: Any, labels: Any) -> Tensor:
        return self._EMPTY

    def predict(self, batch: int) -> Tensor | None:
        return None

    def backward(self, batch: int, gradient: Tensor | None, microbatch: int = 0) -> Tensor | None:
        self._updated = batch
        return self._EMPTY if self._flow.at_update(batch) else None

    def step(self, batch: int) -> None: ...

    def skip(self, batch: int) -> None: ...

    def learn(self, batch: int, gradient: Tensor) -> Tensor | None:
        return self._EMPTY if self._flow.relays(batch) else None

    def true_gradient(self) -> Tensor | None:
        return self._EMPTY if self.last and self._flow.samples(self._updated) else None

    def judge(self, batch: int, gradient: Tensor) -> tuple[None, Tensor]:
        return None, self._EMPTY

    def loss_of(self, batch: int) -> float:
        return float("nan")
