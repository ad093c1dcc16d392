"""compose/scripts/smoke.sh, run for real beside a docker that answers as the stack would."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from compose.elastic.build import FOLDER
from tests.services.test_elastic import fields_of_metrics

ORDER_ID = "01a21160-2929-7b8d-aa55-2764d5ae913a"
DOCKER = """#!/bin/sh
echo "$*" >> "$FAKE/calls"
case "$*" in
    "compose version") ;;
    *"ps -q elasticsearch") cat "$FAKE/container" ;;
    "inspect -f {{.State.Running}} abc") cat "$FAKE/running" ;;
    *"exec -T postgres psql"*) echo confirmed ;;
    *"exec -T elasticsearch "*)
        while [ "$1" != elasticsearch ]; do shift; done
        shift
        exec "$@"
        ;;
    *) exit 9 ;;
esac
"""
"""Instead of docker: has a container of Elasticsearch or not, and runs here what shall be run in it."""


class Stack(BaseHTTPRequestHandler):
    """The API and Elasticsearch. `answers` is what Elasticsearch says, the last of it again and again; `asked` is what it was asked."""

    answers: list[tuple[int, bytes]]
    asked: list[tuple[str, str, str]]
    traces: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.traces.append(self.headers["traceparent"])
        self._say(201, f'{{"order_id":"{ORDER_ID}","status":"placed"}}'.encode())

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.asked.append((url.path, parse_qs(url.query)["q"][0], self.headers["authorization"]))
        self._say(*(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]))

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def smoke(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.CompletedProcess[str], type[Stack]]]]:
    """Runs smoke.sh against a stack that is no more than `Stack`, in a copy of compose/ without an .env."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    for name in ("docker-compose.yml", "scripts/compose.sh", "scripts/smoke.sh"):
        (tmp_path / "compose" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER.parent / name, tmp_path / "compose" / name)
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    handler = type("Handler", (Stack,), {"answers": [(200, b'{"count":0}')], "asked": [], "traces": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        port = server.server_address[1]
        (tmp_path / ".curlrc").write_text(f"connect-to = 127.0.0.1:9200:127.0.0.1:{port}\n")

        def run(
            answers: list[tuple[int, bytes]], seconds: int, container: str = "abc", running: str = "true", **environment: str
        ) -> tuple[subprocess.CompletedProcess[str], type[Stack]]:
            handler.answers = answers
            (tmp_path / "container").write_text(container)
            (tmp_path / "running").write_text(running)
            done = subprocess.run(
                ["sh", str(tmp_path / "compose" / "scripts" / "smoke.sh"), str(seconds)],
                env={
                    "PATH": f"{tmp_path}:/usr/bin:/bin",
                    "FAKE": str(tmp_path),
                    "CURL_HOME": str(tmp_path),
                    "API_PORT": str(port),
                    "ELASTIC_PASSWORD": "secret",
                    **environment,
                },
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            return done, handler

        yield run
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("container", "running"), [("", ""), ("abc", "false")], ids=["none", "stopped"])
def test_the_smoke_test_is_content_with_the_database_where_elasticsearch_does_not_run(
    smoke: Callable[..., Any], container: str, running: str
) -> None:
    done, stack = smoke([], 0, container, running)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"order {ORDER_ID}: confirmed\n", "")
    assert stack.asked == []


def test_the_smoke_test_waits_until_elasticsearch_has_the_trace(smoke: Callable[..., Any], tmp_path: Path) -> None:
    done, stack = smoke(
        [(200, b'{"count":0}'), (200, b'{"count":7,"_shards":{"total":1}}')], 30, OTEL_ENDPOINT="http://collector:4318"
    )
    assert done.returncode == 0, done.stderr
    (parent,) = stack.traces
    version, trace, span, flags = parent.split("-")
    assert (version, len(trace), len(span), flags) == ("00", 32, 16, "01")
    who = "Basic " + base64.b64encode(b"elastic:secret").decode()
    assert stack.asked == [("/traces-*/_count", f"trace_id:{trace}", who)] * 2
    assert done.stdout.splitlines()[1] == f"order {ORDER_ID}: Elasticsearch has its trace {trace}, 7 documents"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum(" --profile core --profile elastic exec -T elasticsearch sh -c curl " in call for call in calls) == 2
    assert not any("secret" in call for call in calls)


@pytest.mark.parametrize("endpoint", ["", "http://elsewhere:4318"])
def test_the_smoke_test_asks_for_metrics_where_traces_go_nowhere_or_elsewhere(smoke: Callable[..., Any], endpoint: str) -> None:
    done, stack = smoke([(200, b'{"count":2}')], 0, OTEL_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    ((path, query, _),) = stack.asked
    assert path == "/metrics-*/_count"
    assert set(re.findall(r"([a-z_.]+):", query)) - {"timestamp"} <= fields_of_metrics()
    assert re.fullmatch(r'.* AND @timestamp:\["\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ" TO \*\]', query)


@pytest.mark.parametrize(
    "answer", [(200, b'{"count":0}'), (401, b'{"error":"unable to authenticate"}')], ids=["nothing", "refused"]
)
def test_the_smoke_test_fails_where_elasticsearch_has_not_heard_of_the_order(
    smoke: Callable[..., Any], answer: tuple[int, bytes]
) -> None:
    done, stack = smoke([answer], 0, OTEL_ENDPOINT="http://collector:4318")
    assert done.returncode == 1
    assert len(stack.asked) == 1
    trace = stack.traces[0].split("-")[1]
    assert done.stderr.startswith(
        f"order {ORDER_ID}: Elasticsearch does not have its trace {trace}; it answers: {answer[1].decode()};"
    )
