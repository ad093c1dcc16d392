"""A span and a duration for each request, by the conventions of OpenTelemetry for HTTP; nothing where no SDK is installed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import metrics, propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode

METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
DURATIONS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Watched:
    """granian's protocol object, remembering the status that was answered."""

    __slots__ = ("_protocol", "status")

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self.status = 0

    def __call__(self) -> Any:
        return self._protocol()

    def __aiter__(self) -> AsyncIterator[bytes]:
        chunks: AsyncIterator[bytes] = self._protocol.__aiter__()
        return chunks

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = status
        self._protocol.response_bytes(status, headers, body)

    def response_empty(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.status = status
        self._protocol.response_empty(status, headers)


class Requests:
    """Made when the app is."""

    def __init__(self) -> None:
        self._tracer = trace.get_tracer("orders-api")
        self._duration = metrics.get_meter("orders-api").create_histogram(
            "http.server.request.duration",
            "s",
            "From a request's arrival to its answer.",
            explicit_bucket_boundaries_advisory=DURATIONS_S,
        )
        self.records = any(
            not type(provider).__module__.startswith(("opentelemetry.trace", "opentelemetry.metrics"))
            for provider in (trace.get_tracer_provider(), metrics.get_meter_provider())
        )
        """Whether an SDK is installed."""

    @contextmanager
    def request(self, scope: Any, route: str, watched: Watched) -> Iterator[None]:
        """Around a request that is answered through `watched`. `route` stands for many paths: a label must not grow with ids."""
        began = time.perf_counter()
        method = scope.method if scope.method in METHODS else "_OTHER"  # any word is a method: a label must not grow with them
        span = self._tracer.start_span(
            f"{method if method in METHODS else 'HTTP'} {route}",
            propagate.extract(scope.headers, getter=_HEADERS),
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route, "url.path": scope.path, "url.scheme": scope.scheme},
        )
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        finally:
            if watched.status >= 500 or not watched.status:
                span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("http.response.status_code", watched.status)
            span.end()
            self._duration.record(
                time.perf_counter() - began,
                {
                    "http.request.method": method,
                    "http.route": route,
                    "http.response.status_code": watched.status,
                    "url.scheme": scope.scheme,
                },
            )


class _Headers:
    """How granian's headers are read by a propagator."""

    def get(self, carrier: Any, key: str) -> list[str] | None:
        return carrier.get_all(key) if key in carrier else None

    def keys(self, carrier: Any) -> list[str]:
        return list(carrier.keys())


_HEADERS: Any = _Headers()
