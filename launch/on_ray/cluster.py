"""Ray, as far as this program uses it: a connection, a placement group, one actor per stage. Nothing else imports ray.

    with connected(address, needs, stages) as cluster:         a cluster that is there, or one of our own
        with cluster.stages(needs, stages, ...) as actors:     room for all of them, or none
            actors.call(calls)                                 every actor's run(); it lives as long as its stage
            actors.lost(stage, within_s)                       what Ray knows about an actor that is gone

No tensor and no record of ours passes through Ray: it starts processes, says where, and notices that they die.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import ray
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._private.state import available_resources_per_node
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.util.metrics import Gauge
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.on_ray.actor import Call, StageAgent
from launch.on_ray.environment import ray_environment
from launch.on_ray.gpus import SEE_ALL, check_own_room
from launch.on_ray.head import RayHead, connects
from launch.setup.local_gpus import gpus_here
from launch.show.bounded_exit import tidied
from pipeline import PlanError

__all__ = ["NAMESPACE", "Actors", "Cluster", "connected", "gauges_of"]

NAMESPACE = "freewheel"
"""Ray namespace of our actors, which are called RUN-stage-K."""
_LOOK_EVERY_S = 0.2
_REACH_WITHIN_S = 5.0
_BORN_WITHIN_S = 120.0  # every actor imports torch
_TIDY_WITHIN_S = 5.0
_SHUT_DOWN_WITHIN_S = 20.0
_KILLED_WITHIN_S = 10.0


@contextlib.contextmanager
def connected(address: str, needs: Mapping[str, float], stages: int) -> Iterator[Cluster]:
    """Connect this process to Ray at ``auto``, ``local`` or HOST:PORT; a local Ray has room for all stages, of which
    each takes ``needs``.

    PlanError: there is no cluster, or it does not take us; or a local one would have too few GPUs. Blocks until
    connected, 5 s where nobody answers; Ray's own start takes seconds.
    """
    local = address == "local"
    with ray_environment(local, _forget_authentication):
        where = _own(needs, stages) if local else {"address": _reachable(address)}
        try:
            ray.init(**where, namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=True)
        except Exception as error:  # Ray raises that very type where its own start takes too long
            raise PlanError(f"address {address}: Ray does not take this program: {_first_line(error)}") from error
        try:
            with RayHead(ray.get_runtime_context().gcs_address) as head:
                yield Cluster(head)
        finally:
            tidied(_SHUT_DOWN_WITHIN_S, ray.shutdown)


class Cluster:
    """A connection to Ray: its head, looked after, and id and address (``host``) of the node this process is on."""

    def __init__(self, head: RayHead) -> None:
        self.head = head
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self.host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def stages(
        self, needs: Mapping[str, float], stages: int, strategy: str, within_s: float, asked: Callable[[], bool]
    ) -> Iterator[Actors]:
        """Reserve room for all stages at once, start an actor in each place, and end all on the way out.

        PlanError: there was no room in time, or an actor could not be started; KeyboardInterrupt: this process was
        ``asked`` to end. Blocks until all actors live; at most ``within_s`` for room, and 120 s for the processes.
        """
        group = placement_group([dict(needs)] * stages, strategy=strategy)
        try:
            if not _arrived([group.ready()], within_s, asked):
                raise PlanError(_no_room(needs, stages, strategy, within_s))
            actors = Actors(group, needs, stages, self.head)
            try:
                actors.await_birth(asked)
                yield actors
            finally:
                actors.end()
        finally:
            tidied(_TIDY_WITHIN_S, partial(remove_placement_group, group))


class Actors:
    """One actor per stage; ``run`` is what their names, RUN-stage-K, begin with."""

    def __init__(self, group: PlacementGroup, needs: Mapping[str, float], stages: int, head: RayHead) -> None:
        self.run, self._head = secrets.token_hex(4), head
        gpus = needs.get("GPU", 0.0)
        custom = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU")}
        self._runs: list[Any] = []
        actor: Any = _ACTOR(StageActor)
        self._actors = [
            actor.options(
                name=f"{self.run}-stage-{stage}",
                num_cpus=needs["CPU"],
                num_gpus=gpus,
                runtime_env={"env_vars": SEE_ALL} if gpus else None,
                resources=custom,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, stage),
            ).remote()
            for stage in range(stages)
        ]

    def await_birth(self, asked: Callable[[], bool]) -> None:
        """Wait until all live; raises and blocks as `Cluster.stages` says."""
        statuses = [actor.status.remote() for actor in self._actors]
        if not _arrived(statuses, _BORN_WITHIN_S, asked):
            within = f"within {_BORN_WITHIN_S:.0f} s"
            raise PlanError(f"Ray did not start the actors of all stages {within}: see ray status.")
        for stage, status in enumerate(statuses):
            try:
                ray.get(status)
            except RayError as error:
                raise PlanError(
                    f"the actor of stage {stage} did not start: {_why(error)}; Freewheel, PyTorch and Ray have to be "
                    "installed on every node in the same versions."
                ) from error

    def call(self, calls: Sequence[Call]) -> None:
        """Start every actor's ``run``. Does not block."""
        encoded = [msgspec.msgpack.encode(call) for call in calls]
        self._runs = [actor.run.remote(call) for actor, call in zip(self._actors, encoded, strict=True)]

    def lost(self, stage: int, within_s: float = 0.0) -> str | None:
        """What Ray knows about the end of an actor's ``run``; None: that it runs.

        Blocks at most ``within_s``, and as long again to see whether the head is gone, which is then the reason.
        """
        ended, _ = ray.wait([self._runs[stage]], timeout=within_s)
        if not ended:
            return self._head.silent(within_s) if within_s else None
        try:
            ray.get(ended)
        except RayError as error:
            return (self._head.silent(within_s) if within_s else None) or _why(error)
        return "its actor has ended"

    def end(self) -> None:
        """End all actors; their workers end with them. Blocks at most 15 s."""
        if self._runs:  # those that were told to stop return by themselves
            ended = partial(ray.wait, self._runs, num_returns=len(self._runs), timeout=_REACH_WITHIN_S)
            tidied(_TIDY_WITHIN_S + _REACH_WITHIN_S, ended)
        tidied(_TIDY_WITHIN_S, lambda: [ray.kill(actor) for actor in self._actors])


def gauges_of(run: str) -> Callable[[float, float | None, Sequence[float]], None]:
    """What sets Ray's metrics of a run while it trains (``launch.on_ray.launcher.Show``), each with the tag ``run``.

    Busy shares are of the last 50 looks, at most five a second; exact ones come from the spans, in the run's result.
    """
    tag = {"run": run}
    loss = Gauge("freewheel_loss", "mean loss of the batches last reported", ("run",))
    rate = Gauge("freewheel_samples_per_s", "samples per second since the last report", ("run",))
    busy = Gauge("freewheel_stage_busy_share", "share of looks that found a stage at work", ("run", "stage"))

    def show(mean: float, samples_per_s: float | None, busy_shares: Sequence[float]) -> None:
        loss.set(mean, tag)
        if samples_per_s is not None:
            rate.set(samples_per_s, tag)
        for stage, share in enumerate(busy_shares):
            busy.set(share, {**tag, "stage": str(stage)})

    return show


class StageActor(StageAgent):
    """`StageAgent` as an actor: ``run`` keeps one thread, control methods have two of their own.

    The driver kills it when its run is over. Without the cluster's head nobody can, so it then ends by itself.
    """

    def __init__(self) -> None:
        node_id: str = ray.get_runtime_context().get_node_id()
        gpus: list[str] = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        super().__init__(f"node {node_id[:8]} ({address})", node_id, gpus)

    def run(self, call: bytes) -> int:
        try:
            return super().run(call)
        finally:
            end = threading.Timer(_KILLED_WITHIN_S, os._exit, (0,))
            end.daemon = True
            end.start()

    status = ray.method(concurrency_group="control")(StageAgent.status)
    stop = ray.method(concurrency_group="control")(StageAgent.stop)


_ACTOR: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 2})  # type: ignore[call-overload]


def _forget_authentication() -> None:
    """Ray keeps mode and token in a cache."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _own(needs: Mapping[str, float], stages: int) -> dict[str, Any]:
    """A Ray of this run's own, with room for all stages however few cores there are, as for local workers; raises
    PlanError where this host has too few GPUs.
    """
    room = {name: amount * stages for name, amount in needs.items()}
    num_cpus, num_gpus = math.ceil(room.pop("CPU")), None
    if room.pop("GPU", 0.0):
        num_gpus = gpus_here()
        check_own_room(needs["GPU"], stages, num_gpus)
    own = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": room or None}
    return {"address": "local", **own, "include_dashboard": False}


def _reachable(address: str) -> str:
    """HOST:PORT of a cluster that answers; ``ray.init`` waits for minutes where nobody does."""
    try:
        found = canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError, OSError) as error:
        raise PlanError(
            f"address {address}: no Ray cluster was found: start one (ray start --head), give its HOST:PORT, or "
            f"--address local for a Ray of this run's own. (Ray: {_first_line(error)})"
        ) from error
    if (silent := connects(found)) is not None:
        raise PlanError(
            f"address {address}: no Ray cluster answers at {found} ({silent}): is it running, and its port reachable "
            "from here?"
        ) from silent
    return found


def _arrived(refs: list[Any], within_s: float, asked: Callable[[], bool]) -> bool:
    """Whether all refs are there in time."""
    end = time.monotonic() + within_s
    while True:
        if asked():
            raise KeyboardInterrupt
        _, missing = ray.wait(refs, num_returns=len(refs), timeout=_LOOK_EVERY_S)
        if not missing or time.monotonic() > end:
            return not missing


def _no_room(needs: Mapping[str, float], stages: int, strategy: str, within_s: float) -> str:
    def amounts(resources: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {resources.get(name, 0.0):g}" for name in needs)

    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    lines = "; ".join(
        f"node {name[:8]} has {amounts(node['Resources'])}, free {amounts(free.get(name, {}))}"
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and (name := node["NodeID"])
    )
    less = "--ray.cpus, --ray.gpus" if "GPU" in needs else "--ray.cpus"
    return (
        f"no room for {stages} stages with {amounts(needs)} each ({strategy}) within {within_s:g} s: {lines}. Give the "
        f"stages less ({less}), wait longer (--ray.wait-s), choose another --ray.strategy, or add nodes."
    )


def _why(error: RayError) -> str:
    """Ray's reason in a line."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {_first_line(error.cause)}"
    if isinstance(error, ActorUnavailableError):
        return "Ray: its process no longer answers"
    if isinstance(error, ActorDiedError):
        return f"Ray: {str(error).strip().splitlines()[-1]}"
    return f"Ray: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
