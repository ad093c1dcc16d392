"""Dead letters as data for programs, and as text for people."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from orderbus._core.message import JSON, MSGPACK
from orderbus._core.parked import Parked
from orderbus.cli.output import plain

MOST_SHOWN = 20_000
MOST_FORMATTED_BYTES = 1_048_576
"""A larger body is shown as it is: untyped decoding takes up to 25 times its size."""


def brief_data(letter: Parked) -> dict[str, Any]:
    """Everything except the body and the headers: listings carry no payloads."""
    return {
        "event": "dead-letter",
        "id": letter.event_id,
        "queue": letter.queue,
        "origin": letter.origin,
        "reason": letter.reason,
        "error": letter.error,
        "error_text": letter.error_text,
        "handler": letter.handler,
        "topic": letter.topic,
        "key": letter.key,
        "attempts": letter.attempts,
        "first_failed_at": utc_time(letter.first_failed_at_s),
        "parked_at": utc_time(letter.parked_at_s),
        "size_bytes": len(letter.body),
        "readable": letter.raw_properties is None,
    }


def as_data(letter: Parked) -> dict[str, Any]:
    """Everything. The body is text where it is UTF-8; `body_base64` is exact in any case."""
    return {
        **brief_data(letter),
        "content_type": letter.content_type,
        "headers": msgspec.to_builtins(letter.headers),
        "body": _utf8(letter.body),
        "body_base64": base64.b64encode(letter.body).decode(),
        "raw_properties_base64": None if letter.raw_properties is None else base64.b64encode(letter.raw_properties).decode(),
    }


def letters_table(letters: Sequence[Parked]) -> RenderableType:
    """Two lines for each, cut to the terminal's width; the event's id is always whole, to be copied."""
    lines: list[RenderableType] = []
    for letter in letters:
        first = Text(no_wrap=True, overflow="ellipsis")
        first.append(f"{plain(letter.event_id or 'without an id', most=60):<36}", style="bold")
        tries = "" if letter.attempts is None else f", {letter.attempts} {'try' if letter.attempts == 1 else 'tries'}"
        first.append(f"  {_one_line(letter.reason)}{tries}")
        error = ": ".join(part for part in (letter.handler, letter.error, letter.error_text) if part)
        second = f"    {_local(letter.parked_at_s)}  {_one_line(error)}"
        lines += [first, Text(second, style="dim", no_wrap=True, overflow="ellipsis")]
    return Group(*lines)


def shown_letter(letter: Parked) -> RenderableType:
    """One field a line, then the body."""
    text = Text()
    for name, value in (
        ("event", letter.event_id),
        ("topic", letter.topic),
        ("key", letter.key),
        ("queue", letter.queue),
        ("came from", letter.origin),
        ("reason", letter.reason),
        ("error", letter.error),
        ("error text", letter.error_text),
        ("handler", letter.handler),
        ("attempts", letter.attempts),
        ("first failed", _local(letter.first_failed_at_s)),
        ("parked", _local(letter.parked_at_s)),
        ("content type", letter.content_type),
        ("raw properties", None if letter.raw_properties is None else letter.raw_properties.hex(" ")),
    ):
        if value is not None:
            text.append(f"{name:<15}", style="bold").append(f"{plain(value)}\n")
    for header, content in letter.headers.items():
        text.append(f"{'header':<15}", style="bold").append(f"{plain(header)}: {plain(repr(content))}\n")
    text.append(f"{'body':<15}", style="bold").append(f"{len(letter.body)} bytes\n")
    return text.append(plain(_readable(letter), most=MOST_SHOWN) + "\n")


def _one_line(text: str) -> str:
    return plain(" ".join(text.split()), most=500)


def _readable(letter: Parked) -> str:
    """The body for a person: JSON and MessagePack in an indented form, other text as it is, anything else in hexadecimal."""
    try:
        if len(letter.body) > MOST_FORMATTED_BYTES:
            pass
        elif letter.content_type == MSGPACK:
            return msgspec.json.format(msgspec.json.encode(msgspec.msgpack.decode(letter.body), enc_hook=repr), indent=2).decode()
        elif letter.content_type in (JSON, None):
            return msgspec.json.format(letter.body, indent=2).decode()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass  # it may be parked for just that: shown as what it is
    text = _utf8(letter.body)
    return letter.body[: MOST_SHOWN // 2].hex(" ") if text is None else text


def _utf8(body: bytes) -> str | None:
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None


def utc_time(seconds: float | None) -> str | None:
    moment = _moment(seconds)
    return None if moment is None else moment.isoformat(timespec="milliseconds")


def _local(seconds: float | None) -> str:
    moment = _moment(seconds)
    return "-" if moment is None else moment.astimezone().isoformat(sep=" ", timespec="seconds")


def _moment(seconds: float | None) -> datetime | None:
    """None too for a time that no calendar has: a stranger may have written it."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None
