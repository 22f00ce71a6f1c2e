"""The options that say who starts the workers, beside those of ``freewheel train`` and ``freewheel bench``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from launch.options.options import BenchOptions, RunOptions
from pipeline import PlanError

__all__ = ["BenchRunOptions", "RayOptions", "TrainOptions", "check_no_launcher", "needs_of"]

_MOST = 10**6
_LEAST_GPU = 1e-4  # Ray counts in ten thousandths


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where Ray puts the stages."""

    strategy: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """PACK: on as few nodes as possible; SPREAD: on as many; STRICT_SPREAD: each stage on a node of its own."""
    cpus: float | None = None
    """CPUs that Ray sets aside for each stage; default: as many as its threads."""
    gpus: float | None = None
    """GPUs that Ray sets aside for each stage: 1, a part of one, or 0; default: 1 with --device cuda, else 0. Stages
    that have some compute on them."""
    resources: str = ""
    """Custom resources that Ray sets aside for each stage: NAME=AMOUNT, several with commas."""
    wait_s: float = 60.0
    """How long to wait until the cluster has room for all stages, in seconds."""

    def problems(self) -> Iterator[str]:
        """What cannot work, one sentence each."""
        for name, value in (("cpus", self.cpus), ("wait_s", self.wait_s)):
            if value is not None and not value > 0:
                yield f"ray.{name} is {value:g}: it must be more than 0."
            if value is not None and value > _MOST:
                yield f"ray.{name} is {value:g}: it must be at most {_MOST:,}."
        if self.gpus is not None and not (self.gpus == 0 or _LEAST_GPU <= self.gpus <= 1):
            yield (
                f"ray.gpus is {self.gpus:g}: a stage computes on one GPU: give 1, or a part of one of at least "
                f"{_LEAST_GPU:g}, or 0 for none."
            )
        for part in _parts(self.resources):
            name, _, amount = part.partition("=")
            if not name or not _is_amount(amount):
                yield f"ray.resources has {part!r}: write NAME=AMOUNT, an amount above 0."
            elif name in ("CPU", "GPU", "memory", "object_store_memory"):
                own = "CPUs are --ray.cpus, GPUs --ray.gpus"
                yield f"ray.resources has {name}, which is none of a cluster's custom resources; {own}."


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """Where the run goes, and who starts the workers."""

    launcher: Literal["local", "ray"] = "local"
    """Who starts the workers: this command, as its children, or Ray, one actor per stage."""
    address: str | None = None
    """Ray's address: auto (RAY_ADDRESS, or the Ray that runs on this host), HOST:PORT, or local (a Ray of this run's
    own); default: auto."""
    ray: RayOptions = RayOptions()
    """Where Ray puts the stages; only with --launcher ray."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.launcher == "ray":
            yield from _address_problems(self.address or "auto")
            yield from self.ray.problems()
            return
        if self.address is not None:
            yield "address has no effect with launcher local: add --launcher ray, or leave it out."
        if self.ray != RayOptions():
            yield "the options of ray have no effect with launcher local: add --launcher ray, or leave them out."


@dataclass(frozen=True, kw_only=True)
class BenchRunOptions(BenchOptions, TrainOptions):
    """How to compare, where the runs go, and who starts the workers."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.launcher == "ray" and self.over_stages:
            yield "over_stages cannot be had with launcher ray, which reserves one place per stage: leave it out."


def needs_of(options: RayOptions, threads: int, gpus: float) -> dict[str, float]:
    """What Ray sets aside for one stage, whose ``gpus`` are ``gpus_wanted``: name of the resource -> amount."""
    custom = (part.partition("=") for part in _parts(options.resources))
    own = {"CPU": options.cpus or float(threads), **({"GPU": gpus} if gpus else {})}
    return {**own, **{name: float(amount) for name, _, amount in custom}}


def check_no_launcher(arguments: Sequence[str], why: str) -> None:
    """Refuse the options that say who starts the workers, where that is settled; ``why`` follows their names."""
    names = [argument.partition("=")[0] for argument in arguments]
    if given := [name for name in names if name.startswith("--ray.") or name in ("--launcher", "--address")]:
        raise PlanError(f"{', '.join(name.removeprefix('--') for name in given)}: {why}")


def _address_problems(address: str) -> Iterator[str]:
    if address.startswith("ray://"):
        yield (
            f"address is {address}: through Ray Client the driver is not in the cluster and its nodes cannot call it; "
            "run the command on a node with --address auto, or with ray job submit."
        )
    elif address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            yield f"address is {address!r}: give auto, local, or HOST:PORT, like 10.0.0.5:6379."


def _parts(resources: str) -> list[str]:
    return [part.strip() for part in resources.split(",") if part.strip()]


def _is_amount(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return 0 < float(text) < math.inf
    return False
