"""Recorded spans, and how to say where each hangs."""

from __future__ import annotations

from collections.abc import Iterator

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer


class Recorded:
    def __init__(self, exporter: InMemorySpanExporter, tracer: Tracer) -> None:
        self._exporter = exporter
        self.tracer = tracer
        """For spans of the caller's own."""

    def __iter__(self) -> Iterator[ReadableSpan]:
        """In the order in which they began."""
        return iter(sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0))

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (found,) = self.named(name)
        return found

    def path(self, span: ReadableSpan) -> list[str]:
        """The names from the root to the span."""
        by_id = {one.context.span_id: one for one in self}
        names = [span.name]
        while span.parent is not None:
            assert span.parent.trace_id == span.context.trace_id
            span = by_id[span.parent.span_id]
            names.append(span.name)
        return names[::-1]
