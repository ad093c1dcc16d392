"""What a message looks like when it leaves its queue: for the retry ladder, or for the dead letters."""

from __future__ import annotations

from orderbus._core.message import (
    ATTEMPT,
    FIRST_FAILED_AT,
    JSON,
    NOT_BEFORE,
    Headers,
    HeaderValue,
    Incoming,
    Outgoing,
    Properties,
    header_bytes,
)
from orderbus._core.topology import RETRY_STEPS_S, dead_letter_queue, retry_exchange, retry_step
from orderbus._core.work import Work
from orderbus.errors import MessageError

REASON = "ob-reason"
ERROR = "ob-error"
ERROR_TEXT = "ob-error-text"
HANDLER = "ob-handler"
QUEUE = "ob-queue"
PARKED_AT = "ob-parked-at"
RAW_PROPERTIES = "ob-raw-properties"

LEFT_OUT = "ob-left-out"
"""How many headers of a parked message had no room beside those that say why it was parked."""

PARKING_HEADERS = frozenset({REASON, ERROR, ERROR_TEXT, HANDLER, QUEUE, PARKED_AT, RAW_PROPERTIES, LEFT_OUT})
_STRIPPED = frozenset({"CC", "BCC", "x-delivery-count", "ob-seq", NOT_BEFORE})
"""`CC` on a message is obeyed when it is published again; `x-death` would grow with each round."""

MOST_TEXT = 1_000
MOST_RAW_BYTES = 8_192
SENT_HEADERS = 64
SENT_HEADER_BYTES = 15 * 1024
"""What the adapters send is 64 headers and 16 KiB; a message beyond that could not be parked."""


def retry_message(work: Work, delay_s: float, *, counted: bool, now_s: float) -> Outgoing:
    """The same message for the retry ladder, to come back after `delay_s` (rounded up to a step; several for a long one)."""
    incoming = work.incoming
    headers = kept_headers(incoming.properties.headers)
    headers[ATTEMPT] = work.attempt if counted else work.attempt - 1
    headers[FIRST_FAILED_AT] = work.first_failed_at or now_s
    if delay_s > RETRY_STEPS_S[-1]:
        headers[NOT_BEFORE] = now_s + delay_s
    return _again(incoming, incoming.properties, work, retry_exchange(retry_step(delay_s)), incoming.queue, headers)


def parked_message(incoming: Incoming, reason: str, error: BaseException | None, *, work: Work | None, now_s: float) -> Outgoing:
    """The same message, exact in its bytes, for the queue's dead letters, with all that the person on call will ask."""
    why: dict[str, HeaderValue] = {REASON: _sendable(reason), QUEUE: incoming.queue, PARKED_AT: now_s}
    if error is not None:
        why[ERROR] = _sendable(type(error).__name__)
        why[ERROR_TEXT] = error_text(error)
    if work is not None:
        why[HANDLER] = work.route.handler.consumer
        why[ATTEMPT] = work.attempt
        why[FIRST_FAILED_AT] = work.first_failed_at or now_s
    try:
        properties = incoming.properties
    except MessageError:
        properties = Properties()
        why[RAW_PROPERTIES] = incoming.raw[:MOST_RAW_BYTES]
    headers = _fitted(kept_headers(properties.headers), why)
    return _again(incoming, properties, work, "", dead_letter_queue(incoming.queue), headers)


def replayed_message(incoming: Incoming, queue: str) -> Outgoing:
    """A dead letter for its own queue again: the same id and bytes, its attempts counted anew."""
    headers = {name: value for name, value in kept_headers(incoming.properties.headers).items() if name not in PARKING_HEADERS}
    headers.pop(ATTEMPT, None)
    headers.pop(FIRST_FAILED_AT, None)
    return _again(incoming, incoming.properties, None, "", queue, headers)


def kept_headers(headers: Headers) -> dict[str, HeaderValue]:
    return {
        name: value
        for name, value in headers.items()
        if name not in _STRIPPED and name != "x-death" and not name.startswith(("x-first-death-", "x-last-death-"))
    }


def error_text(error: BaseException) -> str:
    """What an exception says, as text that can be sent: bounded, and without what UTF-8 can't write."""
    try:
        return _sendable(str(error))
    except Exception:  # its own __str__ is broken, which must not keep its message from being parked
        return f"{type(error).__name__} can't say what it is about"


def _fitted(original: Headers, why: Headers) -> dict[str, HeaderValue]:
    """Both together; of the original headers as many as there is room for, our own first."""
    headers = dict(why)
    left_bytes = SENT_HEADER_BYTES - header_bytes(why)
    left_out = 0
    for name, value in sorted(original.items(), key=lambda header: not header[0].startswith("ob-")):
        size_bytes = header_bytes({name: value})
        if name in why:
            continue
        if len(headers) >= SENT_HEADERS - 1 or size_bytes > left_bytes:
            left_out += 1
            continue
        headers[name] = value
        left_bytes -= size_bytes
    if left_out:
        headers[LEFT_OUT] = left_out
    return headers


def _sendable(text: str) -> str:
    return text[:MOST_TEXT].encode("utf-8", "replace").decode()


def _again(
    incoming: Incoming, properties: Properties, work: Work | None, exchange: str, routing_key: str, headers: Headers
) -> Outgoing:
    """`type` names the topic: once it goes by its queue's name, the routing key no longer does."""
    return Outgoing(
        exchange=exchange,
        routing_key=routing_key,
        body=incoming.body,
        message_id=properties.message_id or "",
        type=properties.type or (work.route.topic if work is not None else ""),
        content_type=properties.content_type or JSON,
        timestamp_s=properties.timestamp_s,
        headers=headers,
    )
