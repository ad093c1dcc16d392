"""Virtual time: no test here may take the time that it speaks of."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from typing import Any

import anyio
import pytest

from orderbus.testing import clock
from orderbus.testing.clock import DeadlockError, VirtualTimeLoop, virtual_backends

pytestmark = pytest.mark.anyio

YEAR_S = 365 * 24 * 3600.0
VIRTUAL = {"loop_factory": VirtualTimeLoop}


@pytest.fixture(params=virtual_backends())
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_a_year_of_sleep_takes_no_time() -> None:
    began, really_began = anyio.current_time(), time.monotonic()

    await anyio.sleep(YEAR_S)

    assert anyio.current_time() - began == pytest.approx(YEAR_S)
    assert time.monotonic() - really_began < YEAR_S / 1000


async def test_timers_fire_in_the_order_of_their_times() -> None:
    woken: list[float] = []

    async def sleep(seconds: float) -> None:
        await anyio.sleep(seconds)
        woken.append(seconds)

    async with anyio.create_task_group() as tasks:
        for seconds in (3000.0, 10.0, 200.0, 0.5):
            tasks.start_soon(sleep, seconds)

    assert woken == [0.5, 10.0, 200.0, 3000.0]


async def test_a_deadline_cuts_off_what_takes_longer_and_nothing_else() -> None:
    began = anyio.current_time()

    with anyio.move_on_after(60) as cut:
        await anyio.sleep(61)
    with anyio.move_on_after(60) as kept:
        await anyio.sleep(59)

    assert (cut.cancelled_caught, kept.cancelled_caught) == (True, False)
    assert anyio.current_time() - began == pytest.approx(119)


async def test_time_stands_still_while_there_is_work() -> None:
    began = anyio.current_time()
    rounds = 0

    async def work() -> None:
        nonlocal rounds
        for _ in range(1000):
            await anyio.lowlevel.checkpoint()
            rounds += 1

    with anyio.move_on_after(0.001):
        await work()

    assert rounds == 1000
    assert anyio.current_time() == began


async def test_a_thread_comes_back() -> None:
    assert await anyio.to_thread.run_sync(lambda: 42) == 42


def test_asyncio_time_begins_at_zero_and_is_exact() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        times = [loop.time()]
        for seconds in (5, 0.25, 86_400 * 3):
            await asyncio.sleep(seconds)
            times.append(loop.time())
        return times

    assert _run(main) == [0.0, 5.0, 5.25, 259_205.25]


def test_sockets_that_are_ready_come_before_timers() -> None:
    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.send(b"ready")
            async with asyncio.timeout(1):
                return await loop.sock_recv(ours, 10)

    assert _run(main) == b"ready"


@pytest.mark.parametrize("backend", virtual_backends())
def test_a_deadlock_raises_and_names_all_who_wait_and_where(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "PATIENCE_S", 0.0)  # idle threads of earlier tests might have something to say

    async def never_set() -> None:
        await anyio.Event().wait()

    async def main() -> None:
        await anyio.sleep(60)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(never_set, name="the-stuck-one")
            tasks.start_soon(never_set, name="another")

    # trio raises it in a stuck task, so it comes out of the task group; asyncio raises it out of the run.
    with pytest.raises((DeadlockError, ExceptionGroup)) as caught:
        anyio.run(main, backend=backend[0], backend_options=backend[1])

    error = caught.value.exceptions[0] if isinstance(caught.value, ExceptionGroup) else caught.value
    assert isinstance(error, DeadlockError)
    for name in ("the-stuck-one", "another"):
        assert re.search(rf"{name} in .*never_set, .*test_clock\.py:\d+", str(error))


def test_a_thread_that_still_works_is_no_deadlock() -> None:
    async def main() -> str:
        released = asyncio.Event()
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(None, lambda: loop.call_soon_threadsafe(released.set))
        await released.wait()
        await work
        return "released"

    assert _run(main) == "released"


def test_a_socket_that_stays_silent_is_a_deadlock_after_the_loop_has_lost_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "PATIENCE_S", 0.01)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            await loop.sock_recv(ours, 10)

    with pytest.raises(DeadlockError):
        _run(main)


def _run(main: Any) -> Any:
    return anyio.run(main, backend="asyncio", backend_options=VIRTUAL)
