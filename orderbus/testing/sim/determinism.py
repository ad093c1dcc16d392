"""Time of day and randomness, of which a run may have none but its own."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["EPOCH_S", "determined"]

EPOCH_S = 1_750_000_000.0
"""The time of day at which every run begins."""


@contextmanager
def determined(seed: int, elapsed_s: Callable[[], float]) -> Iterator[None]:
    """Have time and randomness of this process come from a run: its clock, and its seed.

    Of the standard library: `time.time`, `time_ns`, `monotonic`, `monotonic_ns`, the functions and unseeded generators of
    `random`, `secrets`, `uuid.uuid4`, `os.urandom`. Not `datetime.now`, nor names bound to the originals before.
    """
    rng = random.Random(f"world {seed}")

    class Seeded(random.Random):
        def seed(self, a: Any = None, version: int = 2) -> None:
            super().seed(rng.getrandbits(64) if a is None else a, version)

    state = random.getstate()
    patches: list[tuple[Any, str, Any]] = [
        (time, "time", lambda: EPOCH_S + elapsed_s()),
        (time, "time_ns", lambda: int((EPOCH_S + elapsed_s()) * 1e9)),
        (time, "monotonic", elapsed_s),
        (time, "monotonic_ns", lambda: int(elapsed_s() * 1e9)),
        (os, "urandom", rng.randbytes),
        (random, "_urandom", rng.randbytes),
        (random, "Random", Seeded),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in patches]
    random.seed(rng.getrandbits(64))
    try:
        for module, name, stand_in in patches:
            setattr(module, name, stand_in)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
        random.setstate(state)
