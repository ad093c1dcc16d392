"""Export of traces and metrics as the standard variables of OpenTelemetry say. Needs `pip install 'orderbus[otel]'`.

`orderbus run` does it by itself. A program that has set up an SDK of its own needs nothing of this.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import metrics, trace

from orderbus._core.settings import masked
from orderbus.errors import UsageError

__all__ = ["exported"]

log = logging.getLogger("orderbus.telemetry")

ENDPOINTS = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)
METRICS_EXPORTER = "OTEL_METRICS_EXPORTER"
PROTOCOL = "http/protobuf"
SPANS_TOGETHER = 512
"""The SDK's own default of OTEL_BSP_MAX_EXPORT_BATCH_SIZE."""
GOODBYE_S = 3.0
QUIET_S = 60.0


@contextlib.contextmanager
def exported(service: str) -> Iterator[None]:
    """Export by OTLP over HTTP while the block runs; the rest goes out when it is left, for 3 s at most.

    With OTEL_METRICS_EXPORTER=prometheus the metrics are served instead, at http://localhost:9464/metrics unless
    OTEL_EXPORTER_PROMETHEUS_HOST and …_PORT say otherwise. Where neither that nor one of OTEL_EXPORTER_OTLP_ENDPOINT, …_TRACES_ENDPOINT
    and …_METRICS_ENDPOINT is set, or where OTEL_SDK_DISABLED is true, it does nothing. `service` is the service's name unless
    OTEL_SERVICE_NAME gives one; samplers, headers, intervals and limits are read from the variables of
    https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/. A collector that is away keeps
    nobody waiting: what finds no room in the buffers (2048 spans unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise) is dropped, and the log
    says so once a minute. To be entered once in a process, before a bus is opened. Raises UsageError where the SDK is not
    installed, for an endpoint, protocol, limit or interval that can't be right, and for a port that is taken.
    """
    if not _is_wanted(os.environ):
        yield
        return
    _check(os.environ)
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        wanted = next(name for name in (*ENDPOINTS, METRICS_EXPORTER) if os.environ.get(name))
        raise UsageError(
            f"{wanted} is set, but the SDK is not installed ({error.name}): pip install 'orderbus[otel]'", code="OB108"
        ) from error
    resource = Resource.create({} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service})
    with _quiet_exporters():
        tracers, meters = None, None
        if _has(os.environ, "TRACES"):
            with _values_named("OTEL_BSP_", "OTEL_SPAN_", "OTEL_ATTRIBUTE_", "OTEL_EVENT_", "OTEL_LINK_"):
                tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
                tracers.add_span_processor(
                    BatchSpanProcessor(OTLPSpanExporter(), max_export_batch_size=_spans_together(os.environ))
                )
            trace.set_tracer_provider(tracers)
        reader: Any = None
        served = contextlib.ExitStack()
        if _is_served(os.environ):
            reader = served.enter_context(_prometheus(os.environ))
        elif _has(os.environ, "METRICS"):
            with _values_named("OTEL_METRIC_EXPORT_"):
                reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        if reader is not None:
            meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
            metrics.set_meter_provider(meters)
        try:
            with served:
                yield
        finally:
            _say_goodbye(tracers, meters)


@contextlib.contextmanager
def _values_named(*prefixes: str) -> Iterator[None]:
    """The SDK complains of a value by the name of its own parameter."""
    try:
        yield
    except ValueError as error:
        values = ", ".join(f"{name}={value[:40]}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes))
        why = " ".join(str(error).split())
        raise UsageError(f"{values}: OpenTelemetry's SDK refuses: {why}", code="OB110") from error


def _spans_together(environment: Mapping[str, str]) -> int | None:
    """How many to export at once, where the queue is to hold fewer than the SDK's default and nothing else is asked for."""
    queue = environment.get("OTEL_BSP_MAX_QUEUE_SIZE", "").strip()
    if (
        environment.get("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "").strip()
        or not queue.isdecimal()
        or not 0 < int(queue) < SPANS_TOGETHER
    ):
        return None
    return int(queue)


@contextlib.contextmanager
def _prometheus(environment: Mapping[str, str]) -> Iterator[Any]:
    """A reader whose metrics are served to whoever scrapes."""
    try:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from prometheus_client import start_http_server
    except ImportError as error:
        raise UsageError(
            f"{METRICS_EXPORTER}=prometheus, but {error.name} is not installed: pip install 'orderbus[otel]'", code="OB108"
        ) from error
    host = environment.get("OTEL_EXPORTER_PROMETHEUS_HOST", "").strip() or "localhost"
    port = environment.get("OTEL_EXPORTER_PROMETHEUS_PORT", "").strip() or "9464"
    reader = PrometheusMetricReader()
    try:
        server, thread = start_http_server(int(port), host)
    except (OSError, OverflowError, ValueError) as error:
        raise UsageError(
            f"the metrics can't be served at {host}:{port}: {error}; set OTEL_EXPORTER_PROMETHEUS_HOST and OTEL_EXPORTER_PROMETHEUS_PORT",
            code="OB111",
        ) from error
    log.info("metrics are served at http://%s:%s/metrics", host, port)
    try:
        yield reader
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _say_goodbye(tracers: Any, meters: Any) -> None:
    """On threads that nobody waits for any longer: the SDK exports everything that it has, whatever time limit it is given."""
    ends = [threading.Thread(target=one.shutdown, daemon=True) for one in (tracers, meters) if one is not None]
    for end in ends:
        end.start()
    deadline = time.monotonic() + GOODBYE_S
    for end in ends:
        end.join(max(deadline - time.monotonic(), 0.0))
    if any(end.is_alive() for end in ends):
        log.warning("the collector does not answer: the last spans and metrics are lost")


def _is_wanted(environment: Mapping[str, str]) -> bool:
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return not disabled and (_is_served(environment) or any(environment.get(name, "").strip() for name in ENDPOINTS))


def _is_served(environment: Mapping[str, str]) -> bool:
    return environment.get(METRICS_EXPORTER, "").strip().lower() == "prometheus"


def _has(environment: Mapping[str, str], signal: str) -> bool:
    if environment.get(f"OTEL_{signal}_EXPORTER", "otlp").strip().lower() == "none":
        return False
    return bool(
        environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
        or environment.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "").strip()
    )


def _check(environment: Mapping[str, str]) -> None:
    mistakes = []
    for name in ENDPOINTS:
        value = environment.get(name, "").strip()
        try:
            parts = urlsplit(value)
            is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            is_right = False
        if value and not is_right:
            mistakes.append(f"{name}={masked(value)}: must be http://host:port or https://host:port; the usual port is 4318")
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"):
        value = environment.get(name, "").strip()
        if value not in ("", PROTOCOL):
            mistakes.append(f"{name}={value[:40]}: only {PROTOCOL} is spoken here; collectors take it at port 4318")
    for signal in ("TRACES", "METRICS"):
        value = environment.get(f"OTEL_{signal}_EXPORTER", "").strip().lower()
        if value not in ("", "otlp", "none") and not (signal == "METRICS" and value == "prometheus"):
            known = "otlp, prometheus or none" if signal == "METRICS" else "otlp or none"
            mistakes.append(f"OTEL_{signal}_EXPORTER={value[:40]}: must be {known}")
    if mistakes:
        raise UsageError("\n".join(mistakes), code="OB110")


class _OnceAMinute(logging.Handler):
    """Hands each place's lines on to the root logger once a minute, and says how many it has kept back meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[tuple[str, int], tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        place = (record.pathname, record.lineno)
        said_at, kept_back = self._places.get(place, (-QUIET_S, 0))
        if now < said_at + QUIET_S:
            self._places[place] = (said_at, kept_back + 1)
            return
        self._places[place] = (now, 0)
        record.exc_info = record.exc_text = None  # a page of traceback about a refused connection
        if kept_back:
            record.msg, record.args = f"{record.getMessage()} ({kept_back} more since then)", None
        logging.getLogger().handle(record)


@contextlib.contextmanager
def _quiet_exporters() -> Iterator[None]:
    """An exporter whose collector is away would log at every try."""
    logger, handler = logging.getLogger("opentelemetry"), _OnceAMinute()
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
