"""What people write on the command line for a time or a rate."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import get_args
from uuid import UUID

import typer

from orderbus._core.outbox_rows import State

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_RATE = re.compile(r"(\d+(?:\.\d+)?)(?:/([smh]))?")


def parse_time(text: str) -> float:
    """A Unix time: `2h` is two hours ago; `2026-01-31T12:00` is local time unless it says `Z` or `+01:00`."""
    ago = _AGO.fullmatch(text)
    if ago:
        return time.time() - float(ago[1]) * _UNIT_S[ago[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time; write 15m, 2h, 3d (ago), or 2026-01-31T12:00") from None


def parse_age(text: str) -> float:
    """Seconds: `90s`, `15m`, `2h`, `3d`."""
    age = _AGO.fullmatch(text)
    if not age:
        raise typer.BadParameter(f"{text!r} is no age; write 90s, 15m, 2h or 3d")
    return float(age[1]) * _UNIT_S[age[2]]


def parse_event_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no event id; write a UUID, as `list` prints it") from None


def parse_state(text: str) -> State:
    for state in get_args(State):
        if text == state:
            return state  # type: ignore[no-any-return]
    raise typer.BadParameter(f"{text!r} is no state; write {', '.join(get_args(State))}")


def parse_rate(text: str) -> float:
    """Letters a second: `20`, `20/s`, `30/m`."""
    rate = _RATE.fullmatch(text)
    if not rate or float(rate[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no rate; write 20/s or 30/m")
    return float(rate[1]) / _UNIT_S[rate[2] or "s"]


def parse_header(text: str) -> tuple[str, str]:
    """A header's name and its value, of which `*` and `?` match anything."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} names no header and value; write --header tenant=acme")
    return name, value
