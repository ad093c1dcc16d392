"""The services' logs: JSON lines on stderr, the drain's receipt as a JSON line on stdout."""

from __future__ import annotations

import logging
import sys
import time

import msgspec
import orjson

from orderbus import Bus


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "@timestamp": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "log.level": record.levelname.lower(),
            "log.logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error.stack_trace"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send the root logger's records there."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def print_receipt(bus: Bus) -> None:
    """What the stop of a bus did, for whoever started the process."""
    if bus.receipt is not None:
        print(orjson.dumps({"event": "drained", "group": bus.group, **_plain(bus.receipt)}).decode(), flush=True)


def _plain(receipt: object) -> dict[str, object]:
    plain: dict[str, object] = msgspec.to_builtins(receipt)
    return plain
