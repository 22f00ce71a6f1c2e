"""Where each worker computes: a choice that needs no device to be made.

    auto             the GPUs of every host, where each has one; else the CPU
    cpu, cuda        the CPU; the GPUs of every host
    cuda:1,cuda:3    these, in the order of the workers of a host; cpu may be among them

A host's devices are shared out in blocks, so that neighbours share one and messages between GPUs are few. With as many
workers as GPUs, or fewer, the n-th worker of a host (its local rank) has the n-th GPU.

    6 workers, 4 GPUs:  0 0 1 2 2 3
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import PlanError

__all__ = ["CPU", "DeviceChoice", "choose_devices", "device_problems", "first_gpu", "on_gpu"]

CPU = "cpu"
_LIST = re.compile(r"(cpu|cuda:\d+)(,(cpu|cuda:\d+))*")


@dataclass(frozen=True)
class DeviceChoice:
    """Where every worker computes, as torch names it (``cpu``, ``cuda:0``), and why; whether torch has NCCL."""

    devices: tuple[str, ...]
    why: str
    nccl: bool = False
    here: bool = True
    """Whether layers may be measured on the first of the GPUs; not where it is, or may be, on another host."""

    @property
    def says(self) -> str:
        """All devices, once each if they are the same."""
        return self.devices[0] if len(set(self.devices)) == 1 else ", ".join(self.devices)


def on_gpu(device: str) -> bool:
    """Whether a device is one."""
    return device != CPU


def first_gpu(devices: Sequence[str]) -> str | None:
    """The first of several devices that is one; None: there is none."""
    return next(filter(on_gpu, devices), None)


def device_problems(wanted: str) -> Iterator[str]:
    """What is wrong with the wish itself, as one sentence."""
    if not isinstance(wanted, str):
        yield f"device is a {type(wanted).__name__}: give a text, auto, cpu, cuda, or cuda:0,cuda:1."
    elif wanted not in ("auto", CPU, "cuda") and not _LIST.fullmatch(wanted):
        yield f"device is {wanted!r}: give auto, cpu, cuda, or devices with commas between them, like cuda:0,cuda:1."


def choose_devices(wanted: str, hosts: Sequence[str], gpus: Mapping[str, int], built: bool = True) -> DeviceChoice:
    """Choose where each worker computes, or raise PlanError: there is no such device.

    ``hosts`` are the workers', ``gpus`` says how many GPUs torch can use on each; ``built``: with CUDA, on this host.
    """
    if wanted == CPU:
        return DeviceChoice((CPU,) * len(hosts), "as asked for")
    without = [host for host in dict.fromkeys(hosts) if not gpus.get(host)]
    missing = "this torch is built without CUDA" if not built else f"torch finds no GPU on {', '.join(without)}"
    if wanted == "auto" and without:
        return DeviceChoice((CPU,) * len(hosts), missing)
    if wanted == "cuda" and without:
        remedy = "install a build of torch with CUDA" if not built else "look what nvidia-smi says there"
        raise PlanError(f"device cuda: {missing}: {remedy}, or choose device cpu.")
    named = wanted.split(",") if wanted not in ("auto", "cuda") else []
    if problems := [
        f"device {device}: {there}: choose among these, or device cpu."
        for host in dict.fromkeys(hosts)
        for there in [f"{host} has cuda:0 to cuda:{gpus[host] - 1}" if gpus.get(host) else missing]
        for device in filter(on_gpu, dict.fromkeys(named))
        if int(device.partition(":")[2]) >= gpus.get(host, 0)
    ]:
        raise PlanError(*problems)
    devices = []
    for worker, host in enumerate(hosts):
        index, count = hosts[:worker].count(host), hosts.count(host)  # its local rank, and how many there are
        offered = named or [f"cuda:{n}" for n in range(gpus[host])]
        devices.append(offered[index if count <= len(offered) else index * len(offered) // count])
    return DeviceChoice(tuple(devices), _reason(wanted, hosts, gpus, devices))


def _reason(wanted: str, hosts: Sequence[str], gpus: Mapping[str, int], devices: Sequence[str]) -> str:
    counts = [gpus[host] for host in dict.fromkeys(hosts)] if wanted in ("auto", "cuda") else []
    found = f"{sum(counts)} GPU{'s' if sum(counts) != 1 else ''} found" if counts else "as asked for"
    used = {(host, device) for host, device in zip(hosts, devices, strict=True) if on_gpu(device)}
    shared = sum(on_gpu(device) for device in devices) > len(used)
    return f"{found}; workers share them" if shared else found
