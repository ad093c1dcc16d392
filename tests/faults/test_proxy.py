"""The proxy passes on what it should, and breaks what it is told to."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back whatever comes; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    proxy = Proxy(echo, random.Random(1))
    yield proxy
    proxy.close()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def exchanged(connection: socket.socket, data: bytes) -> bytes:
    """What comes back, until it is whole or the connection is over."""
    threading.Thread(target=_send, args=(connection, data), daemon=True).start()
    back = bytearray()
    while len(back) < len(data) and (part := connection.recv(1 << 16)):
        back += part
    return bytes(back)


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)


def test_bytes_pass_unchanged_whole_delayed_or_sliced(proxy: Proxy) -> None:
    data = random.Random(2).randbytes(20_000)
    with connect(proxy) as connection:
        assert exchanged(connection, data) == data
        proxy.latency_s = 0.01
        assert exchanged(connection, data) == data
        proxy.is_sliced = True
        assert exchanged(connection, data) == data


def test_a_reset_at_a_random_byte_ends_the_connection_within_the_limit(proxy: Proxy) -> None:
    proxy.reset_within(10_000)
    with connect(proxy) as connection, contextlib.suppress(ConnectionResetError):
        assert len(exchanged(connection, bytes(20_000))) < 10_000
    assert proxy.resets == 1
    proxy.pass_on()
    with connect(proxy) as connection:
        assert exchanged(connection, b"again") == b"again"


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_black_hole_swallows_and_tells_nobody(proxy: Proxy, way: str) -> None:
    with connect(proxy) as connection:
        assert exchanged(connection, b"before") == b"before"
        proxy.black_hole(up=way == "up", down=way == "down")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            exchanged(connection, b"lost")


def test_a_silent_server_accepts_and_says_nothing_and_a_refusing_one_ends_it_at_once(proxy: Proxy) -> None:
    proxy.fall_silent()
    with connect(proxy) as connection:
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            exchanged(connection, b"anybody?")
    proxy.pass_on()
    proxy.refuse()
    with connect(proxy) as connection:
        assert _ended(connection)
    proxy.pass_on()
    with connect(proxy) as connection:
        assert exchanged(connection, b"well again") == b"well again"


def _ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_after_a_failover_new_connections_go_to_the_new_address(proxy: Proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        proxy.target_port = other.getsockname()[1]
        with connect(proxy) as connection:
            accepted, _ = other.accept()
            with accepted:
                connection.sendall(b"hello")
                assert accepted.recv(10) == b"hello"
