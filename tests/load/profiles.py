"""How many of the most users there are at each moment, as a share from 0 to 1 over a share of the time from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Profile = Callable[[float], float]


def steady(at: float) -> float:
    """All of them, from the beginning."""
    return 1.0


def ramp(at: float) -> float:
    """From a tenth to all within four fifths of the time; then all."""
    return min(0.1 + 0.9 * at / 0.8, 1.0)


def spike(at: float) -> float:
    """A fifth; all of them at once, for a fifth of the time; a fifth again."""
    return 1.0 if 0.4 <= at < 0.6 else 0.2


def soak(at: float) -> float:
    """Half of them, for as long as you like."""
    return 0.5


PROFILES: Mapping[str, Profile] = {"steady": steady, "ramp": ramp, "spike": spike, "soak": soak}
