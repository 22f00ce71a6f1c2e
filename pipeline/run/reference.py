"""The reference driver: all stages in one process on a virtual clock. Deterministic, exact, no real time.

Runs of processes are compared with it; delays are tried out in it that no machine here has; and with hollow stages it
gives the order of actions of a run that is to be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pipeline.data.loader import inputs, phantom_inputs
from pipeline.data.network import stage_layers
from pipeline.data.recipe import Recipe
from pipeline.messages.message import Message
from pipeline.messages.queue_ends import Inlet, Outlet
from pipeline.plan.device_choice import CPU, choose_devices
from pipeline.plan.plan import Plan
from pipeline.plan.replica_layout import plan_of, policy_of, worker_of
from pipeline.plan.topology import Edge, data_edge, edges_of, name_of
from pipeline.replicas.all_gather import ROOM, gathering
from pipeline.replicas.averaging import averager_of
from pipeline.run.hollow_stage import HollowStage
from pipeline.run.resolve import resolve
from pipeline.run.resolved import Resolved
from pipeline.run.runner import Runner
from pipeline.run.virtual_time import VirtualClock, VirtualQueue, VirtualSource
from pipeline.schedule.policies import Action
from pipeline.stage.dni_quality import Quality
from pipeline.stage.evaluation import EvaluationMetrics
from pipeline.stage.stage import Stage
from pipeline.stage.unlock import Switch

ENDS = (Action.UPDATE, Action.BACKWARD, Action.SKIP)
"""What ends a batch, or a microbatch of it."""

Pipelines = Sequence[Sequence[Stage | HollowStage]]  # one for every replica
Sources = Callable[[Callable[[int], bool], int], Iterator[Message]]
"""(whether it is enough before a step, replica) -> what comes into its first stage."""

__all__ = ["ENDS", "Costs", "Event", "Reference", "run_reference", "schedule", "timeline"]


@dataclass(frozen=True)
class Costs:
    """Ticks of the virtual clock; a step of an unlocked stage is ``forward`` and ``backward``.

    ``late(channel, batch)`` ticks more than a hop is a message under way; channels are called ``activations 0->1``,
    ``gradients 1->0``, ``averages 0->1``.
    """

    forward: int = 1
    backward: int = 2
    learn: int = 0
    late: Callable[[str, int], int] = lambda channel, batch: 0

    def of(self, action: Action) -> int:
        """Of one action."""
        ticks = {Action.FORWARD: self.forward, Action.LEARN: self.learn, Action.AVERAGE: 0, Action.SKIP: 0}
        return ticks.get(action, self.backward)

    def hop(self, steps: float) -> int:
        """Of a hop of ``steps`` steps."""
        return round(steps * (self.forward + self.backward))


@dataclass(frozen=True)
class Event:
    """Stage ``stage`` of replica ``replica`` did ``action`` from tick ``start`` to ``end``."""

    stage: int
    action: Action
    batch: int  # counts that action on that stage; those of ENDS as one
    start: int
    end: int
    replica: int = 0


@dataclass
class Reference:
    """What a run of the reference driver gives; the stages are trained."""

    resolved: Resolved
    stages: list[Stage]  # of replica 0
    losses: list[float] = field(default_factory=list)  # of every step, the mean over the replicas; ends with ``until``
    scores: list[tuple[int, EvaluationMetrics]] = field(default_factory=list)  # after so many updates, of every pass
    events: list[Event] = field(default_factory=list)
    qualities: dict[int, list[Quality]] = field(default_factory=dict)  # of the sampled batches, by stage
    switches: list[Switch] = field(default_factory=list)  # of replica 0, in order
    others: list[list[Stage]] = field(default_factory=list)  # the stages of the other replicas

    @property
    def reached(self) -> int | None:
        """After how many updates ``until`` was met first; None: never, or not asked for."""
        goal = self.resolved.plan.goal
        met = (n for n, scores in self.scores if goal is not None and goal.met(scores.loss(), scores.accuracy()))
        return next(met, None)

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers under the unsplit model's names."""
        return {name: t.detach() for stage in self.stages for name, t in stage.state_tensors().items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer states under the unsplit model's names."""
        return {name: t for stage in self.stages for name, t in stage.optimizer_tensors().items()}


def run_reference(recipe: Recipe, plan: Plan, costs: Costs | None = None) -> Reference:
    """Train in this process as the plan says; a hop takes ``plan.hop_steps``.

    Uses torch's current number of threads; processes use ``plan.threads``. Device ``auto`` is the CPU here. With
    ``until``, no batch is taken once the last stage has met the goal; what is in the pipeline by then is finished.
    PlanError: recipe or plan cannot run. StageError: the work failed.
    """
    wanted, hosts = CPU if plan.device == "auto" else plan.device, ["this host"] * plan.workers
    devices = choose_devices(wanted, hosts, {"this host": torch.cuda.device_count()}, torch.backends.cuda.is_built())
    resolved = resolve(recipe, plan, devices=devices)
    plan, recipe = resolved.plan, resolved.arranged(recipe)
    cuts = (None, *resolved.cuts, None)

    def stage(replica: int, k: int) -> Stage:
        device, mine = resolved.devices[worker_of(plan, replica, k)], plan_of(plan, replica)
        return Stage(stage_layers(recipe, plan, k), k, mine, recipe, cuts[k + 1], cuts[k], device=device)

    pipelines = [[stage(replica, k) for k in range(plan.stages)] for replica in range(plan.replicas)]
    result = Reference(resolved, pipelines[0], others=pipelines[1:])
    result.events = _drive(pipelines, plan, partial(inputs, recipe, plan, resolved.steps), costs or Costs(), result)
    return result


def schedule(plan: Plan, held_out_batches: int, costs: Costs | None = None) -> list[list[Action]]:
    """The order of actions of every worker, without computing anything."""
    orders: list[list[Action]] = [[] for _ in range(plan.workers)]
    for event in timeline(plan, held_out_batches, costs or Costs()):
        orders[worker_of(plan, event.replica, event.stage)].append(event.action)
    return orders


def timeline(plan: Plan, held_out_batches: int, costs: Costs) -> list[Event]:
    """What every stage does when, on the virtual clock, without computing anything; in order of begin."""
    steps = plan.steps
    assert steps is not None, "the plan is resolved"
    hollow = [[HollowStage(k, plan) for k in range(plan.stages)] for _ in range(plan.replicas)]
    return _drive(hollow, plan, lambda enough, r: phantom_inputs(plan, steps, held_out_batches, r), costs, None)


def _drive(pipelines: Pipelines, plan: Plan, sources: Sources, costs: Costs, result: Reference | None) -> list[Event]:
    reached = (lambda: False) if result is None else (lambda: result.reached is not None)
    clock, runners = _connected(pipelines, plan, sources, costs, reached)
    losses: list[dict[int, float]] = [{} for _ in pipelines]  # of every replica, by batch
    if result is not None:
        _listen(runners, plan, losses, result)
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
            counted = Action.UPDATE if action in ENDS else action
            batch = counts[k][counted] = counts[k].get(counted, -1) + 1
            replica, stage = divmod(k, plan.stages)
            events.append(Event(stage, action, batch, clock.now, busy_until[k], replica))
            moved = True
        if not (moved or clock.advance()):
            views = "; ".join(f"stage {k} {runner.view()}" for k, runner in enumerate(runners) if not runner.done)
            raise RuntimeError(f"deadlock at tick {clock.now}: every stage waits. {views}")
    if result is not None:
        result.losses = [sum(each) / len(each) for each in zip(*(of.values() for of in losses), strict=False)]
    return events


def _listen(runners: Sequence[Runner], plan: Plan, losses: Sequence[dict[int, float]], result: Reference) -> None:
    """Have the runners tell what they find: losses per replica, scores from replica 0."""
    for worker, runner in enumerate(runners):
        replica, stage = divmod(worker, plan.stages)
        runner.on_quality = result.qualities.setdefault(stage, []).append
        if replica == 0:
            runner.on_switch = result.switches.append
        if runner.stage.last:
            runner.on_loss = losses[replica].__setitem__
            runner.on_scores = lambda updates, scores: result.scores.append((updates, scores))


def _connected(
    pipelines: Pipelines, plan: Plan, sources: Sources, costs: Costs, asked: Callable[[], bool]
) -> tuple[VirtualClock, list[Runner]]:
    """A runner for every worker, with queues between them and the data in front of them."""
    clock, runners, queues = VirtualClock(), list[Runner](), dict[Edge, VirtualQueue]()
    hop, step = costs.hop(plan.hop_steps), costs.forward + costs.backward
    on_the_way = -(-hop // step)  # what a link itself holds
    for edge in edges_of(plan):
        capacity = {
            "activations": plan.channel.slots + on_the_way,
            "gradients": plan.gradient_slots_at(edge.cut) + 2 * on_the_way * (plan.stages - edge.cut),
            "averages": ROOM,
        }[edge.what]
        wire_dtype = None if edge.what == "averages" else plan.wire_dtype
        queues[edge] = VirtualQueue(clock, capacity, hop, wire_dtype, partial(costs.late, name_of(edge, plan)))
    for replica, stages in enumerate(pipelines):
        for k, stage in enumerate(stages):
            worker = worker_of(plan, replica, k)
            inlets: dict[Edge, Inlet] = {edge: queue for edge, queue in queues.items() if edge.target == worker}
            outlets: dict[Edge, Outlet] = {edge: queue for edge, queue in queues.items() if edge.source == worker}
            averager = averager_of(plan, stage.state_tensors(), gathering(plan, k, replica, inlets, outlets), asked)
            if k == 0:
                inlets[data_edge(plan, replica)] = VirtualSource(sources(averager.enough, replica))
            # Batches that stage k begins while one goes up to the last stage and back: a step a stage, two hops a cut.
            ahead = (plan.stages - 1 - k) * -(-(step + 2 * hop) // step) if plan.in_flight == "full" else None
            runner = Runner(stage, policy_of(plan), inlets, outlets, plan.stages, plan.microbatches, ahead, averager)
            runners.append(runner)
    return clock, runners
