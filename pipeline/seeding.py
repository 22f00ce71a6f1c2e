"""Where randomness comes from: every random number follows from (seed, what it is for), never from what ran before.

A layer's dropout mask depends on (seed, layer, batch), not on the stage that runs the layer, so a network gives the
same numbers split into one, two or four stages, and a recomputed forward repeats the first one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

__all__ = ["derived_seed", "seed_layer", "seeded"]


def derived_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``derived_seed(0, "batches", epoch)``. The same in every process."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_layer(seed: int, layer: int, batch: int) -> None:
    """Seed the global generator for one layer's forward pass of one batch; do so in a plain loop for equal dropout."""
    _seed_all(derived_seed(seed, "layer", layer, batch))


@contextmanager
def seeded(seed: int, *purpose: int | str) -> Iterator[None]:
    """Run a block with the global generators of torch, numpy and ``random`` seeded for ``purpose``.

    They are then as before, but for the second normal number of a pair, which numpy's legacy functions keep.
    """
    on_gpu = torch.cuda.is_initialized()
    on_devices = torch.random.fork_rng(devices=[torch.cuda.current_device()]) if on_gpu else nullcontext()
    derived = derived_seed(seed, *purpose)
    with on_devices, _numpy_seeded(derived % 2**32):
        before, before_random = torch.get_rng_state(), random.getstate()
        try:
            _seed_all(derived)
            random.seed(derived)
            yield
        finally:
            random.setstate(before_random)
            torch.set_rng_state(before)


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Another bit generator meanwhile: saving and restoring the state of one takes a quarter of a millisecond."""
    before = get_bit_generator()
    mine = _spare.pop() if _spare else np.random.MT19937()  # blocks stand in each other; to make one takes as long
    set_bit_generator(mine)
    try:
        np.random.seed(seed)
        yield
    finally:
        set_bit_generator(before)
        _spare.append(mine)


_spare: list[np.random.MT19937] = []


def _seed_all(seed: int) -> None:
    """``torch.manual_seed`` without its 2 ms: before CUDA has started it formats a stack trace for later."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
