"""The W3C trace context as it travels in message headers and outbox rows. No SDK, no clock.

https://www.w3.org/TR/trace-context/: `traceparent` is `00-<trace id>-<parent id>-<flags>`, and the lowest bit of the flags says whether
the trace is recorded. Whoever can't read it begins a trace anew, so one that is malformed is left out and harms nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from orderbus._core.message import Headers

__all__ = ["TRACEPARENT", "TRACESTATE", "TraceHeaders", "is_sampled", "trace_headers"]

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
MOST_TRACESTATE = 512
"""Characters; the specification asks that so many be carried on."""

TraceHeaders = Mapping[str, str]
"""`traceparent`, and `tracestate` where there is one."""

_ODD = frozenset("13579bdf")
_READABLE = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


def trace_headers(headers: Headers) -> TraceHeaders | None:
    """The trace context of a message; None where there is none that can be read.

    >>> trace_headers({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "other": 1})
    {'traceparent': '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'}
    >>> trace_headers({"traceparent": "00-0-0-01"})
    """
    parent = headers.get(TRACEPARENT)
    if not isinstance(parent, str) or not _READABLE.fullmatch(parent):
        return None
    state = headers.get(TRACESTATE)
    if isinstance(state, str) and 0 < len(state) <= MOST_TRACESTATE and state.isascii() and state.isprintable():
        return {TRACEPARENT: parent, TRACESTATE: state}
    return {TRACEPARENT: parent}


def is_sampled(headers: TraceHeaders) -> bool:
    """Whether the trace is recorded: the lowest bit of the last hex digit."""
    return headers[TRACEPARENT][-1:] in _ODD
