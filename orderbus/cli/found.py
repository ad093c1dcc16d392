"""What `orderbus check` finds."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["ok", "note", "finding", "unavailable"]
"""A note is no fault: `orderbus run` mends it by itself."""
Seen = tuple[Status, str]


class Found(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    what: str
    status: Status
    text: str
