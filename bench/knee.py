"""The search for a knee: the highest rate at which a system still keeps what is asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

STEP = 1.25
PRECISION = 1.06
"""The search ends when the lowest rate that broke is at most so many times the highest that held."""
LEAST, MOST = 10, 50_000


class Knee(msgspec.Struct, frozen=True):
    """Rates a second. `held` is 0 where not even LEAST was held, `broke` None where MOST was."""

    held: int
    broke: int | None


def find_knee(first: int, held: Callable[[int], bool]) -> Knee:
    """Steps of STEP from `first`, up as long as a rate is held and down as long as it isn't, then halves of what is between.

    It believes every answer: a `held` that errs by chance must ask twice itself.
    """
    low, high = 0, 0
    rate = first
    while not (low and high):
        if held(rate):
            if rate >= MOST:
                return Knee(rate, None)
            low, rate = rate, min(math.ceil(rate * STEP), MOST)
        else:
            if rate <= LEAST:
                return Knee(0, rate)
            high, rate = rate, max(int(rate / STEP), LEAST)
    while high > low * PRECISION:
        middle = round(math.sqrt(low * high))
        if middle in (low, high):
            break
        if held(middle):
            low = middle
        else:
            high = middle
    return Knee(low, high)


def hold(knee: Knee, held: Callable[[int], bool]) -> Knee:
    """The rate that is also held for longer, which is what `held` now asks: the knee's, or a lower one, in steps of PRECISION."""
    rate, broke = knee.held, knee.broke
    while rate >= LEAST:
        if held(rate):
            return Knee(rate, broke)
        rate, broke = int(rate / PRECISION), rate
    return Knee(0, broke)
