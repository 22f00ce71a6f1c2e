"""Where randomness comes from: every random number follows from (seed, what it is for), never from what ran before.

A layer's dropout mask depends on (seed, layer, batch), not on the stage that runs the layer, so a network gives the
same numbers split into one, two or four stages, and a recomputed forward repeats the first one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

__all__ = ["derived_seed", "seed_layer", "seeded"]


def derived_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``derived_seed(0, "batches", epoch)``. The same in every process."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_layer(seed: int, layer: int, batch: int) -> None:
    """Seed the global generator for one layer's forward pass of one batch.

    Called by every stage before each layer; call it the same way in a plain training loop to get the same dropout.
    """
    _seed_all(derived_seed(seed, "layer", layer, batch))


@contextmanager
def seeded(seed: int, *purpose: int | str) -> Iterator[None]:
    """Run a block with the global generator seeded for ``purpose``; the generator's state is restored after it."""
    on_gpu = torch.cuda.is_initialized()
    on_devices = torch.random.fork_rng(devices=[torch.cuda.current_device()]) if on_gpu else nullcontext()
    with on_devices:
        before = torch.get_rng_state()
        try:
            _seed_all(derived_seed(seed, *purpose))
            yield
        finally:
            torch.set_rng_state(before)


def _seed_all(seed: int) -> None:
    """``torch.manual_seed`` without its 2 ms: before CUDA has started it formats a stack trace for later."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
