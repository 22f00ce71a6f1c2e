"""``--launcher ray``: one Ray actor per stage in a placement group, supervised like the ranks of torchrun.

this process    driver: console, run folder, verdict
   |  Ray       starts the actors, says where they are, and what it knows when one is gone
   |  wire      everything else that driver and stages tell each other (workers.supervision.control_records)
actor k         agent -> worker of stage k
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from launch.on_ray.actor import Call
from launch.on_ray.gpus import gpus_wanted, with_devices, without_places
from launch.options.options import Parsed
from launch.options.ray_options import BenchRunOptions, TrainOptions, needs_of
from launch.ranks.agreement import check_link, profile
from launch.ranks.bench_driver import Coordinator
from launch.ranks.torchrun import BenchesRun, TrainsRun
from launch.setup.rank import MEET_WITHIN_S, held_back_signals, memory
from launch.setup.resolve_source import resolve_source
from launch.training import Launcher, Working
from pipeline import Plan, PlanError, Recipe
from pipeline.metrics.spans import WAITING, Span
from pipeline.plan.channel_choice import choose_channels
from pipeline.plan.device_choice import first_gpu
from pipeline.run.resolved import Resolved
from pipeline.wording import escaped
from workers.errors import RunFailed
from workers.supervision.control_socket import Reception
from workers.supervision.remote_workers import RemoteWorkers
from workers.telemetry import records

__all__ = ["bench_on_ray", "placed_on_nodes", "showing", "train_on_ray"]

Show = Callable[[float, float | None, Sequence[float]], None]
"""(loss, samples per second if known, busy share of every stage) -> None."""
_LOOKS = 50
_NOT_AT_WORK = (*WAITING, Span.OTHER)


def train_on_ray(recipe: str, arguments: list[str], parsed: Parsed, trained: TrainsRun) -> int:
    """``freewheel train --launcher ray``: ``trained`` runs the training; returns the exit status, once it is over.

    Raises:
        PlanError: Ray is not there or has no room, or something cannot run on a node; no worker was started.
        RunFailed: a worker, an actor or a node failed; everything was stopped and cleaned up.
        KeyboardInterrupt: this process, or an actor's ``stop``, was asked to end the run.
    """
    options: TrainOptions = parsed.run
    gpus = gpus_wanted(parsed.plan, options.ray.gpus)
    places = without_places(parsed.plan, gpus)
    resolved = resolve_source(parsed.source, parsed.plan, devices=places)  # refuses what cannot run before Ray is asked
    with _staffed("train", recipe, arguments, parsed, gpus) as (fleet, names, show):
        resolved = placed_on_nodes(resolved, fleet, options, names)
        with fleet.prepared(resolved, profile(resolved)):
            return trained(recipe, arguments, parsed, resolved, Launcher("ray", showing(fleet, show)))


def bench_on_ray(recipe: str, arguments: list[str], parsed: Parsed, benched: BenchesRun) -> int:
    """``freewheel bench --launcher ray``, as with ``train_on_ray``; ``benched`` runs the rows."""
    options: BenchRunOptions = parsed.run
    if gpus_wanted(parsed.plan, options.ray.gpus):
        raise PlanError(
            "bench with launcher ray is there on the CPU only: its row backprop trains in this process, for which Ray "
            "sets no GPU aside: use torchrun, or choose device cpu and leave --ray.gpus out."
        )
    with _staffed("bench", recipe, arguments, parsed, 0.0) as (fleet, names, _):

        def resolve(source: Callable[[], Recipe], plan: Plan) -> Resolved:
            before = resolve_source(source, plan, devices=without_places(plan, 0.0))
            return placed_on_nodes(before, fleet, options, names)

        return benched(recipe, arguments, parsed, Coordinator(parsed, fleet).site("ray", resolve))


@contextlib.contextmanager
def _staffed(
    command: str, recipe: str, arguments: list[str], parsed: Parsed, gpus: float
) -> Iterator[tuple[RemoteWorkers, str, Callable[[str], Show]]]:
    """An actor per stage, all gathered; what they are called; what shows a run's metrics. Raises as `train_on_ray`."""
    try:
        from launch.on_ray import cluster as ray_cluster
    except ImportError as error:
        raise PlanError(
            f"launcher ray needs the package ray, 2.59 or newer, which is not there ({error}): "
            "pip install 'freewheel[ray]'."
        ) from error
    if odd := next((text for text in (recipe, *arguments, os.getcwd()) if escaped(text) != text), None):
        raise PlanError(f"launcher ray tells every node what was typed and where, and {odd!r} is no valid UTF-8.")
    options: TrainOptions = parsed.run
    plan, address = parsed.plan, options.address or "auto"
    needs = needs_of(options.ray, plan.threads, gpus)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(ray_cluster.connected(address, needs, plan.workers))
        asked = _asked_with(cluster.head.problem, held_back_signals())
        where = options.ray.strategy, options.ray.wait_s
        actors = stack.enter_context(cluster.stages(needs, plan.workers, *where, asked))
        reception = stack.enter_context(Reception(cluster.host))
        fleet = RemoteWorkers(plan.workers, asked, lost=actors.lost)
        stack.callback(fleet.hang_up)
        with fleet:
            driver = reception.host, reception.port, reception.key
            told = driver, command, recipe, arguments, os.getcwd(), plan.threads, gpus
            actors.call([Call(worker, *told) for worker in range(plan.workers)])
            fleet.gather(reception, MEET_WITHIN_S, memory=f"{cluster.node_id}/{memory()}")
            check_link(plan, fleet.hosts)
            yield fleet, f"{actors.run}-stage-K", ray_cluster.gauges_of


def showing(
    fleet: RemoteWorkers, shown: Callable[[str], Show]
) -> Callable[[Callable[[], Recipe], Resolved, Path], contextlib.AbstractContextManager[Working]]:
    """What `launch.training.Launcher.working` needs, of prepared agents; ``shown``: name of the run -> its `Show`."""

    def working(source: object, resolved: Resolved, run_dir: Path) -> contextlib.nullcontext[Working]:
        reported = _metered(fleet, fleet.run(run_dir), resolved, shown(run_dir.name))
        return contextlib.nullcontext((reported, fleet.end_early))

    return working


def _asked_with(problem: Callable[[], str | None], asked: Callable[[], bool]) -> Callable[[], bool]:
    """Whoever looks whether to end also looks whether there is a problem, which fails the run."""

    def look() -> bool:
        if (why := problem()) is not None:
            raise RunFailed(why, stage=None)
        return asked()

    return look


def placed_on_nodes(resolved: Resolved, fleet: RemoteWorkers, options: TrainOptions, names: str) -> Resolved:
    """With the devices that Ray assigned, the channels that fit the places, and all of it among the reasons.

    ``resolved`` is as it was before Ray placed the stages (``launch.on_ray.gpus.without_places``); ``names`` is what
    the actors are called. Raises PlanError where a channel was asked for that does not fit the places.
    """
    if first_gpu(resolved.devices):
        devices = [hello.device for hello in fleet.hellos]
        resolved = with_devices(resolved, devices, all(hello.nccl for hello in fleet.hellos))
    hosts = fleet.hosts
    channels = choose_channels(resolved.plan.channels, hosts, resolved.plan.replicas, resolved.devices, resolved.nccl)
    places = ", ".join(f"{worker} on {host}" for worker, host in enumerate(hosts))
    reason = "ray", places, f"one actor each, {names}, {options.ray.strategy}"
    return replace(resolved, channels=channels, hosts=tuple(hosts), reasons=(*resolved.reasons, reason))


def _metered(
    fleet: RemoteWorkers, reported: Iterator[records.Record], resolved: Resolved, show: Show
) -> Iterator[records.Record]:
    """Pass on what is reported, and show what it says in Ray's metrics."""
    looks = [deque[bool](maxlen=_LOOKS) for _ in range(resolved.plan.workers)]
    rows = resolved.step_rows
    last_ns: int | None = None
    for record in reported:
        if isinstance(record, records.Loss) and record.replica == 0:
            for stage, seen in enumerate(looks):
                seen.append(fleet.read(stage).span not in _NOT_AT_WORK)
            since_s = None if last_ns is None else (record.time_ns - last_ns) * 1e-9
            rate = rows * len(record.losses) / since_s if since_s else None
            show(sum(record.losses) / len(record.losses), rate, [sum(seen) / len(seen) for seen in looks])
            last_ns = record.time_ns
        yield record
