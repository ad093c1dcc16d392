"""What a JSON line says of the message that it is about, whoever logs it: the handler, a library that it calls, or orderbus."""

from __future__ import annotations

import json
import logging
from typing import Any

import anyio
import anyio.to_thread
import pytest

from orderbus import Batch, Delivery, Retry, Tx
from orderbus.logs import configure
from tests.runtime.faults import StoreFaults
from tests.runtime.world import Log, Paid, Placed, World, until
from tests.telemetry.spans import Recorded

pytestmark = pytest.mark.anyio

log = logging.getLogger("shop")
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
OF_THE_MESSAGE = {"event.id", "orderbus.consumer", "orderbus.queue", "trace.id", "span.id"}


def lines(capsys: pytest.CaptureFixture[str], logger: str = "shop") -> list[dict[str, Any]]:
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in told if line["log.logger"] == logger]


def about(line: dict[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in OF_THE_MESSAGE & line.keys()}


def traced(flags: str) -> dict[str, Any]:
    return {"headers": {"ob-key": "a", "traceparent": f"00-{TRACE}-{PARENT}-{flags}"}}


@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
async def test_a_line_of_a_handler_says_which_event_it_handles(
    world: World, capsys: pytest.CaptureFixture[str], ordered: bool
) -> None:
    configure("shop", as_json=True)
    bus = world.bus()

    @bus.on(Placed, ordered=ordered)
    async def handle(event: Placed) -> None:
        log.info("handled")
        await anyio.to_thread.run_sync(log.info, "in a thread")

    async with bus:
        event_id = await world.send(Placed(order="a"))
        await until(lambda: bus.stats.handled == 1)
        log.info("outside")

    inside, in_thread, outside = lines(capsys)
    queue = "shop.ordered" if ordered else "shop.orders.placed"
    assert about(inside) == {"event.id": str(event_id), "orderbus.consumer": "shop.orders.placed", "orderbus.queue": queue}
    assert about(in_thread) == about(inside)
    assert about(outside) == {}


async def test_a_line_of_a_handler_is_in_the_trace_of_its_message_recorded_or_not(
    world: World, recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("shop", as_json=True)
    bus = world.bus()

    @bus.on(Placed)
    async def handle(event: Placed, tx: Tx) -> None:
        log.info("%d", event.n)

    async with bus:
        await world.send(Placed(order="a", n=0), **traced("00"))
        await until(lambda: bus.stats.handled == 1)
        await world.send(Placed(order="a", n=1), **traced("01"))
        await until(lambda: bus.stats.handled == 2)

    unsampled, sampled = lines(capsys)
    assert (unsampled["trace.id"], unsampled["span.id"]) == (TRACE, PARENT)
    span = recorded.one("process orders.placed")
    assert (sampled["trace.id"], sampled["span.id"]) == (TRACE, f"{span.context.span_id:016x}")


async def test_a_line_of_a_batch_s_handler_says_who_it_is_and_names_no_single_event(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("shop", as_json=True)
    bus = world.bus()

    @bus.on_batch(Placed, most=10)
    async def handle(batch: Batch[Placed]) -> None:
        log.info("handled")

    async with bus:
        await world.send(Placed(order="a"), **traced("00"))
        await until(lambda: bus.stats.handled == 1)

    (line,) = lines(capsys)
    assert about(line) == {"orderbus.consumer": "shop.orders.placed", "orderbus.queue": "shop.orders.placed"}


async def test_handlers_that_run_beside_each_other_have_their_own_lines(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    configure("shop", as_json=True)
    bus, begun = world.bus(), Log()

    @bus.on(Placed, guard="none", fuse=10)
    async def handle(event: Placed, delivery: Delivery) -> None:
        begun(event.n)
        await begun.reached(5)
        log.info("%s", delivery.id)

    async with bus:
        for n in range(5):
            await world.send(Placed(order="a", n=n))
        await until(lambda: bus.stats.handled == 5)

    told = lines(capsys)
    assert len({line["event.id"] for line in told}) == 5
    assert all(line["event.id"] == line["message"] for line in told)


async def test_a_task_that_a_handler_leaves_behind_is_in_no_event_s_name(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("shop", as_json=True)
    bus, over = world.bus(), anyio.Event()

    async def stays() -> None:
        await over.wait()
        log.info("later")

    async with anyio.create_task_group() as tasks:

        @bus.on(Placed)
        async def handle(event: Placed) -> None:
            tasks.start_soon(stays)

        async with bus:
            await world.send(Placed(order="a"))
            await until(lambda: bus.stats.handled == 1)
        over.set()

    (line,) = lines(capsys)
    assert about(line) == {}


async def test_a_stuck_event_and_an_outage_are_told_of_with_their_event(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    configure("shop", as_json=True)
    bus, faults = world.bus(), StoreFaults(world.store)

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        pass

    async with bus:
        async with bus.transaction() as tx:
            tx.emit(Paid(order="a"))
        await until(lambda: bus.stats.stuck)
        faults.is_away = True
        event_id = await world.send(Placed(order="a"), **traced("00"))
        await anyio.sleep(30)
        faults.is_away = False
        await until(lambda: bus.stats.handled == 1)
        await anyio.sleep(5)
        await world.send(Placed(order="a"))
        await until(lambda: bus.stats.handled == 2)
        stuck_id = world.store.outbox.stuck()[0].row.event_id

    told = capsys.readouterr().out
    everything = [json.loads(line) for line in told.splitlines()]
    stuck = next(line for line in everything if "is stuck" in line["message"])
    assert (stuck["event.id"], stuck["event.reason"]) == (str(stuck_id), "unroutable")
    first, *rest, last = [line for line in everything if line["log.logger"] == "orderbus.consumer"]
    who = {"orderbus.consumer": "shop.orders.placed", "orderbus.queue": "shop.orders.placed"}
    for line in (first, *rest):
        assert about(line) == {**who, "event.id": str(event_id), "trace.id": TRACE, "span.id": PARENT}
        assert line["error.type"] == "UnavailableError"
    assert "still trying" in rest[0]["message"]
    assert about(last) == who
