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

PARKING_HEADERS = frozenset({REASON, ERROR, ERROR_TEXT, HANDLER, QUEUE, PARKED_AT, RAW_PROPERTIES})
_STRIPPED = frozenset({"CC", "BCC", "x-delivery-count", "ob-seq", NOT_BEFORE})
"""`CC` on a message is obeyed when it is published again; `x-death` would grow with each round."""

MOST_TEXT = 1_000
MOST_RAW_BYTES = 65_536


def retry_message(work: Work, delay_s: float, *, counted: bool, now_s: float) -> Outgoing:
    """The same message for the retry ladder, to come back after `delay_s` (rounded up to a step; several for a long one)."""
    incoming = work.incoming
    headers = kept_headers(incoming.properties.headers)
    headers[ATTEMPT] = work.attempt if counted else work.attempt - 1
    headers[FIRST_FAILED_AT] = work.first_failed_at or now_s
    if delay_s > RETRY_STEPS_S[-1]:
        headers[NOT_BEFORE] = now_s + delay_s
    return _again(incoming, incoming.properties, retry_exchange(retry_step(delay_s)), incoming.queue, headers)


def parked_message(incoming: Incoming, reason: str, error: BaseException | None, *, work: Work | None, now_s: float) -> Outgoing:
    """The same message, exact in its bytes, for the queue's dead letters, with all that the person on call will ask."""
    try:
        properties = incoming.properties
        headers = kept_headers(properties.headers)
    except MessageError:
        properties = Properties()
        headers = {RAW_PROPERTIES: incoming.raw[:MOST_RAW_BYTES]}
    headers[REASON] = reason[:MOST_TEXT]
    headers[QUEUE] = incoming.queue
    headers[PARKED_AT] = now_s
    if error is not None:
        headers[ERROR] = type(error).__name__
        headers[ERROR_TEXT] = str(error)[:MOST_TEXT]
    if work is not None:
        headers[HANDLER] = work.route.handler.consumer
        headers[ATTEMPT] = work.attempt
        headers[FIRST_FAILED_AT] = work.first_failed_at or now_s
    return _again(incoming, properties, "", dead_letter_queue(incoming.queue), headers)


def replayed_message(incoming: Incoming, queue: str) -> Outgoing:
    """A dead letter for its own queue again: the same id and bytes, its attempts counted anew."""
    headers = {name: value for name, value in kept_headers(incoming.properties.headers).items() if name not in PARKING_HEADERS}
    headers.pop(ATTEMPT, None)
    headers.pop(FIRST_FAILED_AT, None)
    return _again(incoming, incoming.properties, "", queue, headers)


def kept_headers(headers: Headers) -> dict[str, HeaderValue]:
    return {
        name: value
        for name, value in headers.items()
        if name not in _STRIPPED and name != "x-death" and not name.startswith(("x-first-death-", "x-last-death-"))
    }


def _again(incoming: Incoming, properties: Properties, exchange: str, routing_key: str, headers: Headers) -> Outgoing:
    return Outgoing(
        exchange=exchange,
        routing_key=routing_key,
        body=incoming.body,
        message_id=properties.message_id or "",
        type=properties.type or "",
        content_type=properties.content_type or JSON,
        timestamp_s=properties.timestamp_s,
        headers=headers,
    )
