"""The trace context of a message: what can be read is carried on, what can't is left out."""

from __future__ import annotations

from typing import Any

import pytest

from orderbus._core.trace_context import MOST_TRACESTATE, TRACEPARENT, TRACESTATE, is_sampled, trace_headers

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_readable_parent_is_carried_on_with_its_state_and_nothing_else() -> None:
    headers = {TRACEPARENT: PARENT, TRACESTATE: "a=1", "other": 1}

    assert trace_headers(headers) == {TRACEPARENT: PARENT, TRACESTATE: "a=1"}


@pytest.mark.parametrize(
    "parent",
    [
        None,
        7,
        PARENT.encode(),
        "",
        PARENT.upper(),
        PARENT + "-00",
        "ff" + PARENT[2:],
        PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        PARENT.replace("b7ad6b7169203331", "0" * 16),
        PARENT[:-1],
    ],
)
def test_a_parent_that_can_not_be_read_begins_a_trace_anew(parent: Any) -> None:
    assert trace_headers({TRACEPARENT: parent, TRACESTATE: "a=1"}) is None


def test_a_message_without_headers_has_no_trace() -> None:
    assert trace_headers({}) is None


@pytest.mark.parametrize("state", ["a", "a=1,b=2", "a" * MOST_TRACESTATE])
def test_a_state_of_up_to_512_characters_is_carried_on(state: str) -> None:
    assert MOST_TRACESTATE == 512
    assert trace_headers({TRACEPARENT: PARENT, TRACESTATE: state}) == {TRACEPARENT: PARENT, TRACESTATE: state}


@pytest.mark.parametrize("state", [None, 7, b"a=1", ["a"], "", "a" * (MOST_TRACESTATE + 1), "a=ü", "a=1\n"])
def test_a_state_that_would_harm_others_is_left_out_and_the_parent_stays(state: Any) -> None:
    assert trace_headers({TRACEPARENT: PARENT, TRACESTATE: state}) == {TRACEPARENT: PARENT}


@pytest.mark.parametrize(("flags", "is_recorded"), [("00", False), ("01", True), ("10", False), ("12", False), ("0f", True)])
def test_the_lowest_bit_of_the_flags_says_whether_a_trace_is_recorded(flags: str, is_recorded: bool) -> None:
    assert is_sampled({TRACEPARENT: PARENT[:-2] + flags}) is is_recorded
