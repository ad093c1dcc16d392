"""A POST over a kept connection, for the load: a socket, and just so much of HTTP/1.1 as the API answers with.

Locust's own clients spend 110 to 200 µs of CPU on a request (URLs, cookies, pools), as much as everything that the API does for it;
this one 25. It belongs to one greenlet.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from gevent import socket

CONNECT_S = 5.0
ANSWER_S = 10.0
READ_BYTES = 65_536
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")


class HttpError(Exception):
    """The answer can't be read, or did not come."""


class Client:
    """One connection, made when needed, and again after a failure."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "127.0.0.1", parts.port or 80
        self._socket: socket.socket | None = None
        self._rest = b""

    def post(self, path: str, body: bytes, headers: str = "") -> tuple[int, bytes]:
        """The status and the body of the answer. `headers` end each with a CRLF. Raises OSError or HttpError."""
        head = f"POST {path} HTTP/1.1\r\nhost: {self._address[0]}\r\ncontent-type: application/json\r\n{headers}content-length: {len(body)}\r\n\r\n"
        try:
            connection = self._socket or self._connect()
            connection.sendall(head.encode() + body)
            return self._answer(connection)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._rest = None, b""

    def _connect(self) -> socket.socket:
        self._socket = socket.create_connection(self._address, timeout=CONNECT_S)
        self._socket.settimeout(ANSWER_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def _answer(self, connection: socket.socket) -> tuple[int, bytes]:
        data = self._rest
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += _received(connection)
        status, length = _STATUS.match(data), _LENGTH.search(data, 0, end)
        if status is None or length is None:
            raise HttpError(f"not an HTTP/1.1 answer with a length: {data[:80]!r}")
        stop = end + 4 + int(length[1])
        while len(data) < stop:
            data += _received(connection)
        self._rest = data[stop:]
        return int(status[1]), data[end + 4 : stop]


def _received(connection: socket.socket) -> bytes:
    found: bytes = connection.recv(READ_BYTES)
    if not found:
        raise HttpError("the server closed the connection before it had answered")
    return found
