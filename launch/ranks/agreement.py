"""What a driver and agents that load the recipe by themselves have to agree on, and an agent's assignment from it.

The driver decides what the plan left open, such as the split by measured time; every agent resolves the same plan with
that decision, and compares what it sees with the driver's profile before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
import torch

from launch.options.options import Parsed
from launch.setup.local_gpus import chosen_here
from launch.setup.resolve_source import resolve_source
from launch.training import without_loss
from pipeline import Plan, PlanError, Recipe
from pipeline.plan.device_choice import DeviceChoice
from pipeline.run.resolved import Resolved
from pipeline.wording import escaped
from workers.channels.gpu.nccl import nccl_here
from workers.channels.names import Names
from workers.channels.net.gloo import Rendezvous
from workers.supervision.control_records import Task
from workers.supervision.remote_workers import RemoteWorkers
from workers.worker.assignment import Assignment

__all__ = ["OwnPart", "PrepareTask", "changed", "changes", "check_link", "prepare_task", "profile", "resolved_on"]

T = TypeVar("T")
PrepareTask = Callable[[Parsed | None, Task], Assignment]
"""(recipe and plan as this process understands them; None: it did not, the driver's task) -> this rank's assignment.
Raises PlanError where driver and rank differ."""


class OwnPart:
    """The agent in the driver's own process: it need not resolve again, once the driver has set ``resolved``."""

    resolved: Resolved | None = None

    def prepare(self, parsed: Parsed | None, task: Task) -> Assignment:
        """See ``PrepareTask``."""
        assert parsed is not None, "the driver ends a run that it has not understood"
        assert self.resolved is not None, "the driver resolves before it says what to do"
        return _assignment(0, parsed, self.resolved, task)


def prepare_task(index: int, parsed: Parsed | None, task: Task) -> Assignment:
    """See ``PrepareTask``. ``index`` is the rank, which is its worker's number (``pipeline.plan.replica_layout``)."""
    assert parsed is not None, "the driver ends a run whose ranks have problems"
    plan = replace(parsed.plan, sizes=tuple(task.sizes), cuts=None)
    devices = DeviceChoice(tuple(task.devices), "as rank 0 says", nccl_here()) if task.devices else None
    resolved = resolve_source(parsed.source, plan, task.hosts, index, devices)
    mine = profile(resolved)
    problems = [
        f"its {what} is {mine.get(what)}, that of rank 0 {value}: give all ranks the same command, recipe and data."
        for what, value in task.profile.items()
        if mine.get(what) != value
    ]
    if problems:
        raise PlanError(*problems)
    return _assignment(index, parsed, resolved, task)


def _assignment(index: int, parsed: Parsed, resolved: Resolved, task: Task) -> Assignment:
    """The folder is filled in at the start."""
    meeting = Rendezvous(*task.meeting) if task.meeting else None
    replica, stage = divmod(index, resolved.plan.stages)
    names, bare = Names(task.prefix), without_loss(resolved)
    return Assignment(stage, bare, parsed.source, names, Path(), meeting, replica=replica)


def resolved_on(workers: RemoteWorkers, source: Callable[[], Recipe], plan: Plan) -> Resolved:
    """A driver's ``resolve_source``, with the hosts of the gathered agents and the GPUs there, and ``check_link``."""
    hosts = workers.hosts
    check_link(plan, hosts)
    gpus = [hello.gpus for hello in workers.hellos]
    return resolve_source(source, plan, hosts, devices=chosen_here(plan, hosts, gpus))


def check_link(plan: Plan, hosts: Sequence[str]) -> None:
    """Raises PlanError where links are to be emulated between hosts."""
    if plan.link is not None and len(set(hosts)) > 1:
        raise PlanError("link delays messages by the clock of one host, and there are several: leave it out.")


def profile(resolved: Resolved) -> dict[str, str]:
    """What all ranks have to agree on, as texts that can be compared and shown."""
    layers = zip(resolved.layer_names, resolved.layer_parameters, strict=True)
    cuts = [[str(spec) for spec in (*cut.specs, *cut.context)] for cut in resolved.cuts]
    plan = {what: json.dumps(value, default=str) for what, value in resolved.plan.as_dict().items()}
    texts = {
        "torch": torch.__version__.partition("+")[0],  # one host may have a build for CUDA, another for the CPU
        "list of layers and their parameters": ", ".join(f"{name} ({count:,})" for name, count in layers),
        "shape of a batch": str(list(resolved.batch_shape)),
        "shape of the output": str(list(resolved.output_shape)),
        "list of what crosses the cuts": str(cuts),
        "list of channels": ", ".join(choice.kind for choice in resolved.channels),
        "number of held-out batches": str(resolved.held_out_batches),
        **{f"plan's {what}": value for what, value in plan.items()},
    }
    return {what: str(escaped(text)) for what, text in texts.items()}  # as they travel


def changes(base: Any, wanted: Any) -> dict[str, Any]:
    """In which fields a plan differs from another, as plain values by name; of a nested one its own differences."""
    found: dict[str, Any] = {}
    for field in fields(base):
        before, after = getattr(base, field.name), getattr(wanted, field.name)
        if after != before:
            found[field.name] = changes(before, after) if is_dataclass(before) else msgspec.to_builtins(after)
    return found


def changed(base: T, differences: Mapping[str, Any]) -> T:
    """The plan that differs from ``base`` as `changes` says: ``changed(base, changes(base, wanted)) == wanted``.

    Raises msgspec.ValidationError where a value is not of its field's type.
    """
    kinds, values = get_type_hints(type(base)), dict[str, Any]()
    for name, value in differences.items():
        before = getattr(base, name)
        nested = is_dataclass(before)
        values[name] = changed(before, value) if nested else value and msgspec.convert(value, kinds[name])
    return replace(base, **values)  # type: ignore[type-var]
