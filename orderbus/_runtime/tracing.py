"""Spans, by the conventions of OpenTelemetry for messaging and databases; and the trace context that goes with each event.

Where no SDK is installed nothing is recorded, and the context of a handled message still goes on to what its handler emits. Where one
is, a delivery whose trace is not sampled makes no span: one costs 10 to 20 µs, as much as all else that is done for a message, and some
times that where it is the only one in a while, since the SDK's code has to be fetched anew. So the ends of spans, and those that nobody
refers to, are told to it some tens at a time, with the times at which they took place. docs/telemetry.md lists the spans and their
attributes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from time import time_ns  # of the SDK's own clock, also where the simulator replaces `time.time_ns`
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

import anyio
import msgspec
from opentelemetry import trace
from opentelemetry.context import Context, attach
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from orderbus._core.message import Outgoing, Receipt
from orderbus._core.trace_context import MOST_TRACESTATE, TRACEPARENT, TRACESTATE, TraceHeaders, is_sampled, trace_headers

log = logging.getLogger("orderbus.telemetry")

if TYPE_CHECKING:
    from orderbus._core.work import Work
    from orderbus.abc import OutboxRow

__all__ = [
    "CURRENT_WORK",
    "Tracing",
    "about",
    "cause_of",
    "current_span",
    "current_trace",
    "inside",
    "library_version",
    "outside",
    "sends",
    "spans_of",
    "trace_ids",
]

Attributes = Mapping[str, str | int | float | bool]


TOLD_TOGETHER = 64
TOLD_AFTER_S = 1.0

CURRENT_WORK: ContextVar[Work | None] = ContextVar("orderbus.current_work", default=None)
"""The delivery whose handler the caller is in; of an `on_batch` handler's, the first."""


@functools.cache
def library_version() -> str:
    """Of the instrumentation, as telemetry calls it. Looked up once: it is read from a file and parsed, which takes a millisecond."""
    from importlib.metadata import version  # a quarter of `import orderbus`, were it above

    return version("orderbus")


def current_trace() -> TraceHeaders | None:
    """The context of the span that the caller is in, or of the delivery that it handles, for the headers of what it sends."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        return headers_of(context)
    work = CURRENT_WORK.get()
    return None if work is None or work.route.handler.batch else cause_of(work)


def current_span() -> Span | None:
    """The span that the caller is in, if it is recorded."""
    span = trace.get_current_span()
    return span if span.is_recording() else None


def outside() -> None:
    """Leave whatever span the caller is in, for the rest of its task: what runs on for long belongs to no request."""
    attach(Context())


def about(work: Work) -> dict[str, str]:
    """What a line of the log says of a delivery, by the names of the Elastic Common Schema where it has one."""
    handler = work.route.handler
    about = {"event.id": str(work.id), "orderbus.consumer": handler.consumer, "orderbus.queue": handler.queue}
    return about | trace_ids(cause_of(work))


def cause_of(work: Work) -> TraceHeaders | None:
    """What the events carry that are emitted because of a delivery."""
    return work.trace if work.span is None else headers_of(work.span.get_span_context())


def trace_ids(headers: TraceHeaders | None) -> dict[str, str]:
    """Trace and span for the log."""
    if headers is None:
        return {}
    _, trace_id, span_id, _ = headers[TRACEPARENT].split("-")[:4]
    return {"trace.id": trace_id, "span.id": span_id}


def sends(system: str) -> dict[str, str]:
    """What the conventions want said of a publish, by metrics as by spans."""
    return {"messaging.system": system, "messaging.operation.name": "send"}


def headers_of(context: SpanContext) -> TraceHeaders:
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    state = context.trace_state.to_header() if context.trace_state else ""
    if state and len(state) <= MOST_TRACESTATE:  # a longer one would be on every event from here on
        return {TRACEPARENT: parent, TRACESTATE: state}
    return {TRACEPARENT: parent}


def _remote(headers: TraceHeaders) -> Context:
    _, trace_id, span_id, flags = headers[TRACEPARENT].split("-")[:4]
    state = headers.get(TRACESTATE)
    context = SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16)),
        trace_state=TraceState.from_header([state]) if state else None,
    )
    return trace.set_span_in_context(NonRecordingSpan(context), Context())


class _End(NamedTuple):
    """Of a span that has been made."""

    span: Span
    at_ns: int
    error: str | None
    outcome: str


class _Settle(NamedTuple):
    """A span that is still to be made."""

    parent: Span
    at_ns: int
    queue: str
    message_id: UUID
    how: str


class Tracing:
    """Makes the spans of one bus. Whether an SDK is there is asked once, when the bus is opened. Not thread-safe."""

    def __init__(self, group: str, *, system: str, database: str) -> None:
        """`system` and `database`: what the conventions call the broker and the store."""
        provider = trace.get_tracer_provider()
        self.records = not isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider))
        """Whether an SDK is installed."""
        self._tracer = provider.get_tracer("orderbus", library_version())
        self.system = system
        self._group = group
        self._database = database
        self._untold: list[_End | _Settle] = []
        self._has_untold = anyio.Event()
        self._waits = True

    async def keep_telling(self) -> None:
        """So that what few messages leave is seen soon, too. Runs until it is cancelled."""
        outside()
        while True:
            await self._has_untold.wait()
            await anyio.sleep(TOLD_AFTER_S)
            self.tell()

    def tell(self) -> None:
        """Have the SDK end and make what it has not been told of yet."""
        untold, self._untold, self._has_untold = self._untold, [], anyio.Event()
        for one in untold:
            if isinstance(one, _End):
                _end(one.span, one.error, one.outcome, one.at_ns)
            else:
                self._settle(one)

    def close(self) -> None:
        """Tell everything. What ends after this, such as a publish that a caller still waits for, is told at once."""
        self._waits = False
        self.tell()

    def _later(self, one: _End | _Settle) -> None:
        self._untold.append(one)
        self._has_untold.set()
        if len(self._untold) >= TOLD_TOGETHER or not self._waits:
            self.tell()

    def _start(
        self,
        name: str,
        context: Context,
        kind: SpanKind,
        attributes: Attributes | None = None,
        links: Sequence[Link] = (),
        at_ns: int | None = None,
    ) -> Span:
        try:
            return self._tracer.start_span(name, context, kind, attributes, links, at_ns)
        except Exception:  # a sampler or processor of the user's: no message suffers for it
            log.exception("no span can be made: %s", name)
            return trace.INVALID_SPAN

    # Consuming

    def begin(self, works: Sequence[Work]) -> None:
        """Give each delivery that is traced its `process` span. To be followed by `end`."""
        for work in works:
            work.span, work.outcome = None, ""
            if work.trace is None:
                headers = work.incoming.properties.headers
                work.trace = trace_headers(headers) if headers else None
            if not self.records or (work.trace is not None and not is_sampled(work.trace)):
                continue
            span = self._start(
                f"process {work.route.topic}",
                _remote(work.trace) if work.trace is not None else Context(),
                SpanKind.CONSUMER,
                self._process_attributes(work),
            )
            if span.is_recording():
                work.span = span

    def end(self, works: Sequence[Work], error: BaseException | None = None) -> None:
        """End their spans; with an error where the whole unit was given up. They stay, as parents of what follows.

        A try that was cancelled, and whose delivery goes back, has no outcome.
        """
        for work in works:
            if work.span is not None:
                failure = error or (work.error if work.outcome in ("retried", "parked", "waits") else None)
                self._later(_End(work.span, time_ns(), None if failure is None else type(failure).__name__, work.outcome))

    def _process_attributes(self, work: Work) -> Attributes:
        attributes: dict[str, str | int | float | bool] = {
            "messaging.system": self.system,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": work.route.topic,
            "messaging.destination.subscription.name": work.incoming.queue,
            "messaging.consumer.group.name": self._group,
            "messaging.message.id": str(work.id),
            "orderbus.consumer": work.route.handler.consumer,
            "orderbus.attempt": work.attempt,
        }
        if work.key is not None:
            attributes["orderbus.key"] = work.key
        return attributes

    @contextmanager
    def handling_batch(self, works: Sequence[Work]) -> Iterator[None]:
        """Around an `on_batch` handler: a span in the trace of the first delivery that is traced, with links to all."""
        spans = spans_of(works)
        if not spans:
            yield
            return
        handler = works[0].route.handler
        span = self._start(
            f"process batch {handler.queue}",
            trace.set_span_in_context(spans[0]),
            SpanKind.INTERNAL,
            {
                "messaging.system": self.system,
                "messaging.batch.message_count": len(works),
                "orderbus.consumer": handler.consumer,
            },
            [Link(one.get_span_context()) for one in spans],
        )
        with _ended(span), inside(span):
            yield

    def settled(self, work: Work, how: str) -> None:
        """The broker is told what became of a delivery."""
        if work.span is not None:
            self._later(_Settle(work.span, time_ns(), work.incoming.queue, work.id, how))

    def _settle(self, settle: _Settle) -> None:
        span = self._start(
            f"settle {settle.queue}",
            trace.set_span_in_context(settle.parent, Context()),  # and not in that of whoever happens to tell
            SpanKind.CLIENT,
            {
                "messaging.system": self.system,
                "messaging.operation.name": settle.how,
                "messaging.operation.type": "settle",
                "messaging.destination.name": settle.queue,
                "messaging.message.id": str(settle.message_id),
            },
            at_ns=settle.at_ns,
        )
        _end(span, at_ns=settle.at_ns)

    @contextmanager
    def periodic(self, place: str) -> Iterator[None]:
        """Around one round of what `@bus.every` registered: a trace of its own."""
        if not self.records:
            yield
            return
        span = self._start(f"every {place}", Context(), SpanKind.INTERNAL)
        with _ended(span), inside(span):
            yield

    # The database

    @contextmanager
    def database(self, operation: str, spans: Sequence[Span] = (), query: str | None = None) -> Iterator[None]:
        """Around a conversation with the store: in the first of the spans that it is for, linked with the others; or in the current."""
        if self.records and not spans and (current := trace.get_current_span()).is_recording():
            spans = [current]
        if not spans:
            yield
            return
        attributes = {"db.system.name": self._database, "db.operation.name": operation}
        if query is not None:
            attributes["db.query.text"] = query
        span = self._start(
            operation,
            trace.set_span_in_context(spans[0]),
            SpanKind.CLIENT,
            attributes,
            [Link(one.get_span_context()) for one in spans[1:]],
        )
        with _ended(span):
            yield

    # Sending

    def sending(self, rows: Sequence[OutboxRow], messages: list[Outgoing]) -> list[tuple[int, Span]]:
        """Begin a `send` span for each traced message, which then carries that span's context; to be given to `sent`."""
        begun: list[tuple[int, Span]] = []
        if not self.records:
            return begun
        for n, row in enumerate(rows):
            headers = row.headers
            if TRACEPARENT not in headers or not is_sampled(headers) or (parent := trace_headers(headers)) is None:
                continue
            message = messages[n]
            attributes: dict[str, str | int | float | bool] = {
                "messaging.system": self.system,
                "messaging.operation.name": "send",
                "messaging.operation.type": "send",
                "messaging.destination.name": row.topic,
                "messaging.rabbitmq.destination.routing_key": message.routing_key,
                "messaging.message.id": message.message_id,
            }
            span = self._start(f"send {row.topic}", _remote(parent), SpanKind.PRODUCER, attributes)
            if span.is_recording():
                messages[n] = _carrying(message, span)
                begun.append((n, span))
        return begun

    def sent(self, begun: Sequence[tuple[int, Span]], receipts: Sequence[Receipt] | None) -> None:
        """End the spans of `sending`; None where nothing was sent."""
        for n, span in begun:
            receipt = Receipt.UNKNOWN if receipts is None else receipts[n]
            self._later(_End(span, time_ns(), None if receipt is Receipt.CONFIRMED else receipt.value, ""))

    @contextmanager
    def leaving(self, moved: Sequence[tuple[Work, Outgoing]]) -> Iterator[list[Receipt]]:
        """Around the publishing of retries and dead letters. They keep the context that they came with: the next try is a sibling.

        The receipts belong into the list that it gives.
        """
        begun = [
            (
                number,
                self._start(
                    f"send {outgoing.exchange or outgoing.routing_key}",
                    trace.set_span_in_context(work.span),
                    SpanKind.PRODUCER,
                    {
                        "messaging.system": self.system,
                        "messaging.operation.name": "send",
                        "messaging.operation.type": "send",
                        "messaging.destination.name": outgoing.exchange or outgoing.routing_key,
                        "messaging.message.id": outgoing.message_id,
                        "orderbus.attempt": work.attempt,
                    },
                ),
            )
            for number, (work, outgoing) in enumerate(moved)
            if work.span is not None
        ]
        receipts: list[Receipt] = []
        try:
            yield receipts
        finally:
            self.sent(begun, receipts or None)


def _carrying(message: Outgoing, span: Span) -> Outgoing:
    return msgspec.structs.replace(message, headers={**message.headers, **headers_of(span.get_span_context())})


def inside(span: Span) -> AbstractContextManager[Span]:
    """Makes a span the current one. What is raised is told where it is decided what follows."""
    return trace.use_span(span, record_exception=False, set_status_on_exception=False)


def spans_of(works: Sequence[Work]) -> list[Span]:
    return [work.span for work in works if work.span is not None]


def _end(span: Span, error: str | None = None, outcome: str = "", at_ns: int | None = None) -> None:
    """`error` is the class only: what an exception says may quote the message."""
    try:
        if not span.is_recording():  # ended by the handler, whose current span it was
            return
        if error is not None:
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", error)
        if outcome:
            span.set_attribute("orderbus.outcome", outcome)
        span.end(at_ns)
    except Exception:  # a processor of the user's, as above
        log.exception("a span can't be ended")


@contextmanager
def _ended(span: Span) -> Iterator[None]:
    failure: str | None = None
    try:
        yield
    except BaseException as error:
        failure = type(error).__name__
        raise
    finally:
        _end(span, failure)
