"""orderbus with OpenTelemetry's SDK, exporting to a sink that throws everything away."""

import multiprocessing
import os
from collections.abc import Awaitable, Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from bench.child import Gate, run_with_uvloop
from bench.job import Job
from bench.peers.orderbus import effect
from orderbus.telemetry import exported


class Sink(BaseHTTPRequestHandler):
    """Answers yes to whatever is sent."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def sink(told: Connection) -> None:
    with HTTPServer(("127.0.0.1", 0), Sink) as server:
        told.send(server.server_address[1])
        server.serve_forever()


def traced(share: float) -> Callable[[Job, Gate], Awaitable[None]]:
    """The program of effect, with this share of its messages sampled."""

    async def telemetry(job: Job, gate: Gate) -> None:
        await effect(msgspec.structs.replace(job, options={"sampled": share}), gate)

    return telemetry


def run(work: Awaitable[Any]) -> None:
    """Under uvloop, with the SDK."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=sink, args=(theirs,), daemon=True)
    process.start()
    try:
        os.environ |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{ours.recv()}",
            "OTEL_BSP_MAX_QUEUE_SIZE": "200000",
            "OTEL_METRIC_EXPORT_INTERVAL": "5000",
        }
        with exported("bench"):
            run_with_uvloop(work)
    finally:
        process.terminate()
        process.join()
