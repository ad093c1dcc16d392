"""What an assertion that fails says: the claim, what there was instead, the most alike first, and which errors were met."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from orderbus import Event, UsageError
from orderbus._core.naming import nearest
from orderbus.testing.clock import innermost_own
from orderbus.testing.record import Try

__all__ = ["Line", "check_fields", "claim", "differences", "errors_of", "shortened"]

T = TypeVar("T")
MOST_LINES = 10
MOST_TEXT = 200
_FOLLOWED = {"retried": "failed and was to be tried again", "parked": "failed and was parked", "waits": "met a missing server"}


class Line(NamedTuple):
    """Something that there was, and how far it is from what was claimed."""

    distance: int
    text: str


def claim(found: Sequence[T], times: int | None, subject: str, verb: str, there: Sequence[Line], more: Sequence[str]) -> list[T]:
    """The found, if there are as many as claimed: at least one, where no number is given. Raises AssertionError otherwise."""
    if times is not None and (not isinstance(times, int) or times < 0):
        raise UsageError(
            f"times={times!r}: how often {subject} {verb} is a whole number, or left out for at least once", code="OB908"
        )
    if len(found) == times or (times is None and found):
        return list(found)
    if times is None:
        headline = f"no {subject} {verb}"
    elif times == 0:
        headline = f"{subject} {verb} {_often(len(found))}, and should never have been"
    else:
        headline = f"{subject} {verb} {_often(len(found))}, not {_often(times)}"
    raise AssertionError("\n".join([headline, *_nearest(there), *more]))


def _often(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _nearest(there: Sequence[Line]) -> list[str]:
    if not there:
        return ["  there was nothing of the kind"]
    ordered = sorted(there, key=lambda line: (line.distance, len(line.text)))
    return _cut([f"  {shortened(line.text)}" for line in ordered])


def _cut(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], f"  … and {len(lines) - MOST_LINES} more"]


def errors_of(tries: Sequence[Try]) -> list[str]:
    """The last error of each event that some handler has not handled (yet)."""
    last = {(one.handler, one.id): one for one in tries}
    failed = [one for one in last.values() if one.error is not None]
    return _cut([f"  {one.handler}: try {one.attempt} {_FOLLOWED[one.outcome]}: {_error(one.error)}" for one in failed])


def differences(event: Event, fields: Mapping[str, object]) -> list[str]:
    """In which of the fields an event differs, in words."""
    return [
        f"{name} is {getattr(event, name)!r}, not {wanted!r}"
        for name, wanted in fields.items()
        if not hasattr(event, name) or getattr(event, name) != wanted
    ]


def check_fields(kind: type[Event], fields: Mapping[str, object]) -> None:
    """Raises UsageError for a field that an event class does not have."""
    for name in fields:
        if name not in kind.__struct_fields__:
            near = nearest(name, kind.__struct_fields__)
            advice = f"did you mean {near!r}?" if near else f"it has {', '.join(kind.__struct_fields__)}"
            raise UsageError(f"{kind.__name__} has no field {name!r}; {advice}", code="OB908")


def shortened(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"


def _error(error: BaseException | None) -> str:
    """With the last place of the user's own code that it came through."""
    if error is None:
        return ""
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    said = ": ".join([type(error).__name__, *(shortened(line) for line in str(error).splitlines()[:1])])
    return f"{said} ({innermost_own(places)})"
