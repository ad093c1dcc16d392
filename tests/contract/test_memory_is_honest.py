"""The memory broker and a real RabbitMQ are driven by the same random operations, and must show the same.

What is compared does not depend on who is how fast: one operation at a time, each with its effect waited for, and after each of them
everything is taken that the prefetch lets through. The queues bear the names of dead letter queues, which the real adapter consumes
at its full prefetch from the start: its careful beginning elsewhere (see its `Subscription`) is not the broker's.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

from orderbus._core.message import Incoming, Outgoing, Settlement
from orderbus._core.topology import Binding, Exchange, Queue, Topology
from orderbus.abc import Broker, Subscription
from orderbus.adapters import memory, rabbitmq
from orderbus.errors import UnavailableError
from tests.contract.conftest import Server, later
from tests.contract.talk import LIMIT_S, message

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

SEEDS = range(8)
OPERATIONS = 40
KEYS = ("a.1", "a.2.x", "b", "nobody", "lost.1")
LIMITS = {"left": 2, "right": 3}
"""The delivery limits. Here messages reach them only by their consumer's leaving: RabbitMQ 3.10 hands a consumer one more than its
prefetch for each of its messages that dies when it is given back (seen as surplus deliveries), and so a newer one comes before it."""
Seen = tuple[Any, ...]


def topology(name: str) -> Topology:
    """Two queues to consume, each with a delivery limit and a dead letter queue, behind a topic exchange with an alternate."""
    events, direct, other = (f"{name}-{part}" for part in ("events", "direct", "other"))
    left, right, dead, lost = (f"{name}-{part}.dlq" for part in ("left", "right", "dead", "lost"))
    return Topology(
        (Exchange(other, "fanout"), Exchange(events, "topic", alternate=other), Exchange(direct, "direct")),
        (
            Queue(left, delivery_limit=LIMITS["left"], dead_letter_exchange="", dead_letter_routing_key=dead),
            Queue(right, delivery_limit=LIMITS["right"], dead_letter_exchange=direct),
            Queue(dead, delivery_limit=50),
            Queue(lost, delivery_limit=50),
        ),
        (
            Binding(events, left, "a.#"),
            Binding(events, right, "*.1"),
            Binding(events, right, "b"),
            Binding(events, right, "#.x"),
            Binding(other, lost, ""),
            Binding(direct, dead, "a.1"),
            Binding(direct, dead, "b"),
            Binding(direct, dead, "lost.1"),
            Binding(direct, dead, "a.2.x"),
        ),
    )


class Driver:
    """Does operations on a broker, and tells what is to be seen of each."""

    def __init__(
        self,
        broker: Broker,
        name: str,
        stack: AsyncExitStack,
        delete_queue: Callable[[str], Awaitable[None]],
        without_consumers: Callable[[str], Awaitable[None]],
    ) -> None:
        self._broker = broker
        self._name = name
        self._stack = stack
        self._delete_queue = delete_queue
        self._without_consumers = without_consumers
        self._open: dict[str, tuple[Subscription, AsyncExitStack]] = {}
        self._paused: set[str] = set()
        self.held: dict[str, list[Incoming]] = {}

    async def do(self, operation: tuple[Any, ...]) -> Any:
        kind, *arguments = operation
        return await getattr(self, kind)(*arguments)

    async def publish(self, batch: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
        messages = [self._message(exchange, key, fields) for exchange, key, fields in batch]
        return [receipt.value for receipt in await self._broker.publish(messages)]

    async def subscribe(self, queue: str, prefetch: int) -> None:
        inner = AsyncExitStack()
        subscription = await inner.enter_async_context(self._broker.subscribe(f"{self._name}-{queue}.dlq", prefetch=prefetch))
        self._stack.push_async_exit(inner)
        self._open[queue], self.held[queue] = (subscription, inner), []

    async def leave(self, queue: str) -> None:
        await self._close(queue)
        await self._without_consumers(f"{self._name}-{queue}.dlq")  # until then it may be handed more, which then comes back

    async def _close(self, queue: str) -> None:
        self._paused.discard(queue)
        _, inner = self._open.pop(queue)
        del self.held[queue]
        await inner.aclose()

    async def settle(self, queue: str, at: int, how: Settlement) -> None:
        subscription, _ = self._open[queue]
        subscription.settle(self.held[queue].pop(at), how)
        await subscription.flush()

    async def pause(self, queue: str) -> None:
        self._paused.add(queue)
        await self._open[queue][0].pause()

    async def delete(self, queue: str) -> str:
        await self._delete_queue(f"{self._name}-{queue}.dlq")
        heard = "unheard"
        if queue in self._paused:
            await self._open[queue][0].flush()
        else:
            with anyio.fail_after(LIMIT_S):
                heard = await self._end_of(self._open[queue][0])
        await self._close(queue)
        await self._broker.apply(topology(self._name))
        return heard

    async def _end_of(self, subscription: Subscription) -> str:
        while True:
            try:
                await subscription.receive()
            except UnavailableError:
                return "heard"

    async def take(self, queue: str, count: int | None) -> list[Seen]:
        """The next `count` deliveries; without a count, as many as come by themselves."""
        subscription, _ = self._open[queue]
        taken: list[Incoming] = []
        if count is None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._take_on, subscription, taken)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
        else:
            with anyio.fail_after(LIMIT_S):
                while len(taken) < count:
                    taken += await subscription.receive()
        self.held[queue] += taken
        return [self._seen(delivery) for delivery in taken]

    async def _take_on(self, subscription: Subscription, taken: list[Incoming]) -> None:
        while True:
            taken += await subscription.receive()

    def _message(self, exchange: str, key: str, fields: dict[str, Any]) -> Outgoing:
        if exchange:
            return message(key, exchange=f"{self._name}-{exchange}", **fields)
        return message(f"{self._name}-{key}.dlq", **fields)

    def _seen(self, delivery: Incoming) -> Seen:
        """All of a delivery that does not belong to the one server: names without their prefix, deaths without their time."""
        properties = delivery.properties
        headers = dict(properties.headers)
        deaths: Any = headers.pop("x-death", [])
        return (
            delivery.body,
            *(self._bare(text) for text in (delivery.queue, delivery.exchange, delivery.routing_key)),
            delivery.redelivered,
            delivery.delivery_count,
            (properties.message_id, properties.type, properties.content_type, properties.timestamp_s),
            sorted((key, self._bare(str(value))) for key, value in headers.items() if not key.startswith("x-last-death")),
            [
                (
                    *(self._bare(str(death[part])) for part in ("queue", "exchange", "reason", "count")),
                    [self._bare(key) for key in death["routing-keys"]],
                )
                for death in deaths
            ],
        )

    def _bare(self, text: str) -> str:
        return text.removeprefix(f"{self._name}-")


class Random:
    """Operations that make sense in the state that the memory broker is in."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._n = 0
        self._paused: set[str] = set()

    def next(self, driver: Driver) -> tuple[Any, ...]:
        rng = self._rng
        queue = rng.choice(("left", "right"))
        if queue not in driver.held:
            self._paused.discard(queue)
            return rng.choice((("subscribe", queue, rng.choice((1, 2, 5))), self._publish()))
        kinds = ["publish", "settle", "settle", "settle", "leave", "pause", "delete"]
        kind = rng.choices(kinds, (4, 4, 4, 4, 1, 0.5, 0.2))[0]
        if kind == "settle" and driver.held[queue]:
            at, how = rng.randrange(len(driver.held[queue])), rng.choice(list(Settlement))
            if how is not Settlement.ACK and driver.held[queue][at].delivery_count == LIMITS[queue]:
                return ("leave", queue)  # it dies by that: see LIMITS
            return ("settle", queue, at, how)
        if kind == "leave":
            return ("leave", queue)
        if kind == "pause" and queue not in self._paused:
            self._paused.add(queue)
            return ("pause", queue)
        if kind == "delete":
            return ("delete", queue)
        return self._publish()

    def takes(self, queue: str) -> bool:
        return queue not in self._paused

    def _publish(self) -> tuple[Any, ...]:
        batch = [self._one() for _ in range(self._rng.randint(1, 4))]
        if self._rng.random() < 0.1:  # the first, for whether those before it are confirmed is a matter of time
            batch[0] = ("none", *batch[0][1:])
        return ("publish", batch)

    def _one(self) -> tuple[str, str, dict[str, Any]]:
        rng = self._rng
        self._n += 1
        fields: dict[str, Any] = {"body": str(self._n), "message_id": f"id-{self._n}"}
        if rng.random() < 0.3:
            fields["headers"] = {"ob-key": "k", "n": self._n, "yes": True}
        if rng.random() < 0.3:
            fields |= {"timestamp_s": 17, "content_type": "x/y"}
        if rng.random() < 0.05:
            fields["headers"] = {"x": float("nan")}
        exchange, key = rng.choice((("events", rng.choice(KEYS)), ("", rng.choice(("left", "right", "missing")))))
        return exchange, key, fields


async def same_depth(pretended: Broker, real: Broker, queue: str) -> None:
    """RabbitMQ moves a dead letter a moment after its death, and those of two queues in any order."""
    with anyio.fail_after(LIMIT_S):
        while await real.depth(queue) != await pretended.depth(queue):
            await anyio.lowlevel.checkpoint()


@pytest.fixture
def broker_flavour() -> tuple[str, Any]:
    """The server that the fixture `server` speaks for."""
    return ("rabbitmq", "asyncio")


@pytest.fixture
async def brokers(vhost_url: str, name: str) -> AsyncIterator[tuple[memory.MemoryBroker, Broker]]:
    async with memory.open_broker("memory://", name=name) as pretended, rabbitmq.open_broker(vhost_url, name=name) as real:
        yield pretended, real


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_is_seen_of_both_brokers_is_the_same(
    brokers: tuple[memory.MemoryBroker, Broker], server: Server, name: str, seed: int
) -> None:
    pretended, real = brokers
    drawn = Random(seed)
    done: list[Any] = []

    async with AsyncExitStack() as stack:
        first = Driver(pretended, name, stack, later(pretended.delete_queue), later(lambda queue: None))
        second = Driver(real, name, stack, server.delete_queue, server.without_consumers)
        for broker in brokers:
            await broker.apply(topology(name))

        async def both(*operation: Any) -> Any:
            done.append(operation)
            expected = await first.do(operation)
            if operation[0] == "take":
                operation = (*operation[:2], len(expected))
            try:
                seen = await second.do(operation)
            except TimeoutError:
                seen = "nothing came"
            assert seen == expected, f"after {done}"
            for queue in {"dead", "lost"} - first.held.keys():
                await same_depth(*brokers, f"{name}-{queue}.dlq")
            return expected

        for _ in range(OPERATIONS):
            await both(*drawn.next(first))
            for queue in sorted(first.held):
                if drawn.takes(queue):
                    await both("take", queue, None)
        for queue in sorted(first.held):
            await both("leave", queue)
        for queue in ("left", "right", "dead", "lost"):
            await both("subscribe", queue, 1_000)
            await both("take", queue, None)
            await both("leave", queue)
