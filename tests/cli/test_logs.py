"""What `orderbus.logs` makes of the lines of a process."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider

from orderbus import UsageError
from orderbus.logs import configure, levels_of

log = logging.getLogger("orderbus.tests.shop")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    quiet = {name: logging.getLogger(name).level for name in ("aiormq", "asyncio", "psycopg", "orderbus.relay", "noisy")}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in quiet.items():
        logging.getLogger(name).setLevel(before)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    output = capsys.readouterr()
    assert output.err == ""
    return [json.loads(line) for line in output.out.splitlines()]


def test_a_line_bears_the_names_of_the_elastic_common_schema(capsys: pytest.CaptureFixture[str]) -> None:
    configure("shop", as_json=True)
    log.warning("order %d waits", 7, extra={"event.id": "01", "amount": 5})

    (line,) = lines(capsys)

    assert line.pop("@timestamp")
    assert line.pop("process.pid")
    assert line == {
        "log.level": "warning",
        "log.logger": "orderbus.tests.shop",
        "message": "order 7 waits",
        "ecs.version": "8.17",
        "service.name": "shop",
        "event.id": "01",
        "amount": 5,
    }


def test_inside_a_span_a_line_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    configure("shop", as_json=True)
    with TracerProvider().get_tracer("test").start_as_current_span("POST") as span:
        log.warning("inside")

    (line,) = lines(capsys)

    assert line["trace.id"] == f"{span.get_span_context().trace_id:032x}"
    assert line["span.id"] == f"{span.get_span_context().span_id:016x}"


def test_an_error_has_its_class_its_place_and_no_more_than_a_line_of_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    configure("shop", as_json=True)
    try:
        raise ValueError("no such column\nDETAIL: row contains (secret)")
    except ValueError:
        log.exception("failed")

    (line,) = lines(capsys)

    assert line["error.type"] == "ValueError"
    assert "test_logs.py" in str(line["error.stack_trace"])
    assert str(line["error.stack_trace"]).endswith("ValueError: no such column")


def test_what_json_does_not_know_is_shown_as_python_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    configure("shop", as_json=True)
    log.warning("odd", extra={"thing": {1, 2}, "bytes": b"\xff"})

    (line,) = lines(capsys)

    assert (line["thing"], line["bytes"]) == ("{1, 2}", "b'\\xff'")


@pytest.mark.parametrize("odd", ["half \ud800", 1 << 70, {1: {(2, 3): 4}}])
def test_what_json_can_hardly_say_loses_no_line(capsys: pytest.CaptureFixture[str], odd: object) -> None:
    configure("shop", as_json=True)
    log.warning("odd", extra={"thing": odd})

    (line,) = lines(capsys)

    assert line["message"] == "odd"
    assert "thing" in line


def test_an_error_is_told_with_its_causes_and_the_members_of_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    configure("shop", as_json=True)
    try:
        try:
            raise KeyError("first")
        except KeyError as first:
            raise ExceptionGroup("two went wrong", [ValueError("one"), OSError("other")]) from first
    except ExceptionGroup:
        log.exception("failed")

    (line,) = lines(capsys)

    told = str(line["error.stack_trace"])
    assert line["error.type"] == "ExceptionGroup"
    for part in ("ExceptionGroup: two went wrong", "ValueError: one", "OSError: other", "KeyError: 'first'"):
        assert part in told


def test_a_storm_is_cut_and_the_next_line_says_how_much(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("orderbus.logs.time.monotonic", lambda: now)
    configure("shop", as_json=True)

    def storm(count: int) -> None:
        for n in range(count):
            log.warning("gone: %d", n)

    storm(120)
    log.warning("another place")
    assert len(lines(capsys)) == 51
    now += 10
    storm(1)

    assert [line["message"] for line in lines(capsys)] == ["gone: 0 (70 lines like this were left out)"]


def test_a_storm_of_lines_that_are_wrong_raises_in_nobodys_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("orderbus.logs.time.monotonic", lambda: now)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    configure("shop", as_json=True)
    for n in range(120):
        now += 10 * (n == 119)
        log.warning("gone: %d", "not a number")  # type: ignore[str-format]

    storm = structlog.wrap_logger(
        logging.getLogger("orderbus.storm"),
        processors=[structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    for n in range(120):
        now += 10 * (n == 119)
        storm.warning("gone", n=n)
    assert lines(capsys)[-1]["message"] == "gone (69 lines like this were left out)"


def test_levels_go_by_logger(capsys: pytest.CaptureFixture[str]) -> None:
    configure("shop", levels="warning,orderbus.relay=debug,noisy=error", as_json=True)
    for name in ("orderbus.relay", "orderbus.consumer", "noisy", "aiormq"):
        logging.getLogger(name).debug("quiet")
        logging.getLogger(name).warning("loud")

    assert [(line["log.logger"], line["message"]) for line in lines(capsys)] == [
        ("orderbus.relay", "quiet"),
        ("orderbus.relay", "loud"),
        ("orderbus.consumer", "loud"),
        ("aiormq", "loud"),
    ]


def test_people_get_lines_that_they_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    configure("shop", as_json=False)
    log.warning("order %d waits", 7)

    output = capsys.readouterr()

    assert output.out == ""
    assert output.err.endswith("WARNING orderbus.tests.shop: order 7 waits\n")


@pytest.mark.parametrize("text", ["loud", "info,orderbus.relay", "info,=debug", "orderbus.relay=loud", ""])
def test_levels_that_can_t_be_read_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="must be one of debug, info, warning, error, or logger=level"):
        levels_of(text)
