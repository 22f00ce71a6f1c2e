"""GPUs of a Ray run: what is asked of Ray, and what it has assigned. Words and numbers only; nothing here asks CUDA.

    --ray.gpus    driver -> Ray       so much of a GPU for each stage: part of its bundle in the placement group
    ids           Ray -> actor        numbers of the node's GPUs, or entries of the node's CUDA_VISIBLE_DEVICES
    cuda:N        actor -> driver     as torch on that node calls it; the driver counts nothing out itself

Ray would let every actor see its own GPU only: each would call it cuda:0, and those of one node could not open each
other's memory. So actors see all GPUs of their node (``SEE_ALL``), and compute on the one that Ray has set aside for
them. Ray reads that variable in the actor's process, before the constructor runs: to set it with the actor is enough in
every cluster, however its nodes were started.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pipeline import Plan, PlanError
from pipeline.plan.device_choice import CPU, DeviceChoice, first_gpu
from pipeline.run.resolved import Resolved

__all__ = ["SEE_ALL", "assigned_device", "check_own_room", "gpus_wanted", "with_devices", "without_places"]

SEE_ALL = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Environment of an actor whose GPUs Ray does not mask."""
_LISTED = 8


def gpus_wanted(plan: Plan, given: float | None) -> float:
    """How much of a GPU Ray sets aside for each stage; 0: stages compute on the CPU.

    ``given`` is ``--ray.gpus``; None: 1 with device cuda, else 0. Raises PlanError where the plan says which GPU, or it
    and ``given`` contradict each other.
    """
    if plan.device not in ("auto", "cuda") and first_gpu(plan.device.split(",")):
        raise PlanError(
            f"device {plan.device}: with launcher ray it is Ray that says which GPU each stage gets: give device cuda, "
            "and how much of one with --ray.gpus."
        )
    if plan.device == "cuda":
        if given == 0:
            raise PlanError("ray.gpus is 0 with device cuda: give more than 0, or choose device cpu.")
        return 1.0 if given is None else given
    if given and plan.emulate is not None:
        raise PlanError("ray.gpus has no effect with emulate, whose stages compute nothing: leave it out.")
    if given and plan.device != "auto":
        raise PlanError(f"ray.gpus has no effect with device {plan.device}: leave it out, or choose device cuda.")
    return given or 0.0


def without_places(plan: Plan, gpus: float) -> DeviceChoice:
    """Where workers compute, as far as it is known before Ray has placed them: on a GPU, if `gpus_wanted` says so.

    Which GPU, and whether torch there has NCCL, says `with_devices` later; this host need have neither.
    """
    if gpus:
        placeholders = tuple(f"cuda:{worker}" for worker in range(plan.workers))
        return DeviceChoice(placeholders, "as Ray assigns them", nccl=True, here=False)
    why = "as asked for" if plan.device != "auto" else "without --ray.gpus Ray sets no GPU aside"
    why = why if plan.emulate is None else "stages sleep instead of computing"
    return DeviceChoice((CPU,) * plan.workers, why)


def with_devices(resolved: Resolved, devices: Sequence[str], nccl: bool) -> Resolved:
    """What `without_places` has left open of a run on GPUs, filled in, with reasons for the first screen and plan.json.

    ``devices`` is the GPU of every worker, as torch on its node calls it; ``nccl``: whether all have NCCL.
    """
    said = {"device": DeviceChoice(tuple(devices), "Ray assigned them").says}
    why = {"device": "Ray assigned them"}
    if resolved.layer_seconds is not None:
        why["split"] = "measured time per layer, on the CPU of this host: the GPUs are those of the nodes"
    reasons = tuple((what, said.get(what, value), why.get(what, old)) for what, value, old in resolved.reasons)
    return replace(resolved, devices=tuple(devices), nccl=nccl, reasons=reasons)


def assigned_device(who: str, ids: Sequence[str], visible: str | None, count: int, built: bool) -> tuple[str, str]:
    """What torch on a node calls the GPU that Ray assigned there: (device, ""), or ("", what is wrong with it).

    ``who`` computes on it, as users see it called. ``ids`` are numbers, or entries of ``visible``, the node's
    ``CUDA_VISIBLE_DEVICES`` (None: not set), which Ray leaves as it is. Torch there sees ``count`` GPUs, and is
    ``built`` with CUDA or not.
    """
    if len(ids) != 1:
        assigned = f"{len(ids)} GPUs ({', '.join(ids)})" if ids else "no GPU"
        return "", (
            f"Ray assigned {assigned} to {who}, which computes on one: look at CUDA_VISIBLE_DEVICES in the "
            "job's runtime_env and where Ray was started on that node."
        )
    (name,) = ids
    names = list(map(str, range(count))) if visible is None else [part.strip() for part in visible.split(",")]
    index = names.index(name) if name in names else count
    if index < count:
        return f"cuda:{index}", ""
    shown = ", ".join(names[: min(count, _LISTED)]) + (", ..." if count > _LISTED else "")
    there = f"torch sees {count} there ({shown})" if count else "torch finds no GPU there"
    remedy = (
        "look what nvidia-smi says there, and start Ray there with as many GPUs as there are (ray start --num-gpus)"
    )
    if not built:
        there, remedy = "torch there is built without CUDA", "install a build of torch with CUDA on that node"
    return "", f"Ray assigned GPU {name} to {who}, and {there}: {remedy}, or choose device cpu."


def check_own_room(gpus: float, stages: int, count: int) -> None:
    """PlanError where a Ray of this run's own cannot place stages that each take ``gpus`` of this host's ``count``."""
    on_one = math.floor(1.0 / gpus + 1e-9)
    if count * on_one < stages:
        found = f"torch finds {count} GPU{'s' if count != 1 else ''} on this host" if count else "torch finds none here"
        raise PlanError(
            f"address local: {stages} stages with GPU {gpus:g} each do not fit, as {found}: give the stages less "
            "(--ray.gpus), use a cluster (--address auto), or choose device cpu."
        )
