"""Claims on a Redis that is away, comes back empty, or does not answer: slower, never wrong."""

from __future__ import annotations

import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from orderbus.abc import ClaimState
from orderbus.adapters.redis import RedisClaims, open_claims
from orderbus.errors import UnavailableError, UsageError
from tests.servers import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

LONG_MS = 60_000


class PrivateRedis:
    """A server of the test's own, which it may kill and start again."""

    def __init__(self, program: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._arguments = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._arguments, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "Ready to accept connections" in line:
                return
        raise AssertionError("redis-server ended while it was starting")

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=30)


@pytest.fixture
def private(tmp_path: Path) -> Iterator[PrivateRedis]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("SERVER MISSING: redis-server is not installed")
    server = PrivateRedis(program, tmp_path)
    yield server
    server.kill()


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(6)}:"


@pytest.fixture
async def claims(redis_url: str, prefix: str) -> AsyncIterator[RedisClaims]:
    async with open_claims(redis_url, prefix=prefix) as claims:
        yield claims
    async with Redis.from_url(redis_url) as client:
        async for key in client.scan_iter(f"{prefix}*"):
            await client.delete(key)


async def _state(claims: RedisClaims, key: str, token: str) -> ClaimState:
    (answer,) = await claims.claim([(key, "f")], token, LONG_MS)
    return answer.state


async def test_opening_needs_no_redis_and_a_call_names_the_place_without_the_password() -> None:
    port = free_port()
    async with open_claims(f"redis://ann:hunter2@127.0.0.1:{port}/3") as claims:
        with pytest.raises(UnavailableError) as raised:
            await claims.claim([("k", "f")], "a", LONG_MS)

    assert f"Redis at 127.0.0.1:{port}/3" in str(raised.value)
    assert "hunter2" not in f"{raised.value!r} {raised.value.__cause__!r}"


async def test_a_redis_that_does_not_answer_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with open_claims(f"redis://127.0.0.1:{port}/", call_s=0.1) as claims:
            with pytest.raises(UnavailableError, match=rf"127\.0\.0\.1:{port}"):
                await claims.claim([("k", "f")], "a", LONG_MS)


@pytest.mark.parametrize("url", ["redis://ann:hun/ter2@127.0.0.1:6379/", "redis://:hunter2@127.0.0.1:hunter2/", "hunter2"])
async def test_a_url_that_cannot_be_read_is_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        async with open_claims(url):
            pass

    assert "hun" not in f"{raised.value!r} {raised.value.__cause__!r}"


async def test_a_redis_that_was_killed_is_unavailable_and_serves_again_once_it_is_back(private: PrivateRedis) -> None:
    """It comes back without keys and without scripts: claims start afresh, and the script is sent again."""
    private.start()
    async with open_claims(private.url) as claims:
        assert await _state(claims, "k", "a") is ClaimState.GRANTED
        assert await _state(claims, "k", "b") is ClaimState.IN_PROGRESS

        private.kill()
        with pytest.raises(UnavailableError):
            await _state(claims, "k", "b")
        private.start()

        assert list(await claims.complete([("k", b"x")], "a", LONG_MS)) == [False]
        assert await _state(claims, "k", "b") is ClaimState.GRANTED


async def test_connections_that_died_while_they_rested_are_not_noticed_by_anyone(private: PrivateRedis) -> None:
    private.start()
    async with open_claims(private.url) as claims:
        await _state(claims, "k", "a")
        private.kill()
        private.start()

        assert await _state(claims, "k", "a") is ClaimState.GRANTED


async def test_a_flushed_script_is_sent_again(private: PrivateRedis) -> None:
    private.start()
    async with open_claims(private.url) as claims, Redis.from_url(private.url) as client:
        await _state(claims, "k", "a")
        await client.script_flush()

        assert await _state(claims, "k", "b") is ClaimState.IN_PROGRESS


async def test_a_completion_whose_answer_was_lost_may_be_repeated(claims: RedisClaims) -> None:
    await _state(claims, "k", "a")

    completed = [await claims.complete([("k", b"x")], "a", LONG_MS) for _ in range(2)]

    assert [list(stored) for stored in completed] == [[True], [True]]


async def test_redis_itself_counts_the_lease_and_the_keeping(claims: RedisClaims, redis_url: str, prefix: str) -> None:
    async with Redis.from_url(redis_url) as client:
        await claims.claim([("k", "f")], "a", 5_000)
        assert 0 < await client.pttl(f"{prefix}k") <= 5_000
        await claims.claim([("k", "f")], "a", LONG_MS)
        assert 5_000 < await client.pttl(f"{prefix}k") <= LONG_MS
        await claims.complete([("k", b"x")], "a", 2 * LONG_MS)
        assert LONG_MS < await client.pttl(f"{prefix}k") <= 2 * LONG_MS


async def test_a_thousand_keys_are_claimed_in_one_call(claims: RedisClaims) -> None:
    keys = [(f"k{n}", "f") for n in range(1000)]
    assert {answer.state for answer in await claims.claim(keys, "a", LONG_MS)} == {ClaimState.GRANTED}
    assert {answer.state for answer in await claims.claim(keys, "b", LONG_MS)} == {ClaimState.IN_PROGRESS}
