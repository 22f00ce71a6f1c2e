"""Stages and links that are not there: their lengths are given, to see many stages and slow links on few cores.

--emulate stage_ms=10,dni_ms=0.2        a stage's forward and backward take 10 ms together (1 : 2), its DNI 0.2 ms
--link latency_ms=50,bandwidth_mbps=100   every message is on its way that long
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from pipeline.errors import PlanError, nearest

__all__ = ["Emulation", "Link"]

_LEAST, _MOST = 1e-6, 3.6e6  # an hour, in ms: beyond, times overflow


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    @classmethod
    def parse(cls, text: str, option: str) -> Self:
        """Read ``name=number,name=number``, or raise PlanError."""
        names = [f.name for f in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, _, number = part.partition("=")
            if name not in names:
                raise PlanError(nearest(name, names, f"name in {option}"))
            try:
                values[name] = float(number)
            except ValueError:
                values[name] = math.nan
            if not (values[name] == 0 or _LEAST <= values[name] <= _MOST):
                raise PlanError(
                    f"{option} {part}: give a number of at least 0, as in {name}=10, and if it is more than 0, from "
                    f"{_LEAST:g} to {_MOST:,.0f}."
                )
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Emulation(_Lengths):
    """What replaces the compute of every stage."""

    stage_ms: float = 10.0
    """Forward and backward of one batch; a third of it is the forward."""
    dni_ms: float = 0.0
    """The DNI, half for a prediction, half for learning."""


@dataclass(frozen=True, kw_only=True)
class Link(_Lengths):
    """What every channel is like."""

    latency_ms: float = 0.0
    """From the end of the transmission to the arrival."""
    bandwidth_mbps: float = 0.0
    """Megabits per second, one message after the other; 0: no limit."""

    def arrival_ns(self, sent_ns: int, free_ns: int, num_bytes: int) -> tuple[int, int]:
        """When a message sent at ``sent_ns`` arrives, and when the link, busy until ``free_ns``, is free again."""
        begin = max(sent_ns, free_ns)
        if self.bandwidth_mbps:
            begin += round(num_bytes * 8e3 / self.bandwidth_mbps)
        return begin + round(self.latency_ms * 1e6), begin
