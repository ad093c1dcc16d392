"""A collector of OpenTelemetry's own protocol, OTLP over HTTP, that keeps what it is sent."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.telemetry.page import Entry, row_of_span

KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}
LIMIT_S = 60.0


class Span:
    """A span as it arrived, with the name of the service that sent it."""

    def __init__(self, service: str, span: Any) -> None:
        self.service = service
        self.name: str = span.name
        self.kind = KINDS[span.kind]
        self.trace_id = span.trace_id.hex()
        self.span_id = span.span_id.hex()
        self.parent_id = span.parent_span_id.hex()
        self.attributes = {one.key: _value(one.value) for one in span.attributes}
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]
        self.began_ns: int = span.start_time_unix_nano

    def __repr__(self) -> str:
        return f"{self.service}: {self.name}"


class Collector:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.spans: list[Span] = []
        self.metrics: dict[tuple[str, str], Any] = {}
        """The latest of each, by service and name."""
        self.changed = threading.Condition()

    def take(self, path: str, body: bytes) -> None:
        with self.changed:
            if path == "/v1/traces":
                traces = ExportTraceServiceRequest.FromString(body)
                for resource in traces.resource_spans:
                    service = _service(resource.resource)
                    self.spans += [Span(service, span) for scope in resource.scope_spans for span in scope.spans]
            elif path == "/v1/metrics":
                found = ExportMetricsServiceRequest.FromString(body)
                for resource in found.resource_metrics:
                    service = _service(resource.resource)
                    for scope in resource.scope_metrics:
                        self.metrics.update({(service, metric.name): metric for metric in scope.metrics})
            self.changed.notify_all()

    def until(self, is_there: Callable[[], bool]) -> None:
        """Wait until what has arrived is as it should be."""
        with self.changed:
            assert self.changed.wait_for(is_there, LIMIT_S), [*self.spans, *self.metrics]

    def trace(self, trace_id: str) -> list[Span]:
        """In the order in which they began."""
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.began_ns)

    def sum(self, name: str, **attributes: str) -> int:
        """Of a counter over all services; of the points that have these attributes, their dots written as two underscores."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        return sum(
            point.as_int
            for (_, one), metric in self.metrics.items()
            if one == name
            for point in metric.sum.data_points
            if wanted.items() <= {pair.key: _value(pair.value) for pair in point.attributes}.items()
        )

    def seen_metrics(self) -> dict[str, Entry]:
        """What of each metric can be compared with the page."""
        found: dict[str, Entry] = {}
        for (_, name), metric in self.metrics.items():
            points = getattr(metric, metric.WhichOneof("data")).data_points
            attributes = frozenset(one.key for point in points for one in point.attributes)
            entry = Entry(_kind(metric), metric.unit, attributes)
            found[name] = found[name] | entry if name in found else entry
        return found

    def seen_spans(self) -> dict[str, Entry]:
        """The same of the spans of each of the page's rows."""
        found: dict[str, Entry] = {}
        for span in self.spans:
            row = row_of_span(span.name, span.attributes)
            entry = Entry(span.kind, "", frozenset(span.attributes))
            found[row] = found[row] | entry if row in found else entry
        return found


@contextmanager
def collecting(status: int = 200) -> Iterator[Collector]:
    """A collector at a free port of the loopback; with another `status` it refuses everything, and says so to each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.take(self.path, gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def _service(resource: Any) -> str:
    return next((one.value.string_value for one in resource.attributes if one.key == "service.name"), "")


def _kind(metric: Any) -> str:
    kind = str(metric.WhichOneof("data"))
    if kind == "sum":
        return "counter" if metric.sum.is_monotonic else "up-down counter"
    return kind


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
