"""The common clock: nanoseconds that mean the same in every process of a host."""

from time import monotonic_ns

__all__ = ["now_ns"]

now_ns = monotonic_ns  # CLOCK_MONOTONIC counts from the boot of the host, not from the start of a process
