"""Which dead letter queues a command means, and the work done on each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID

import anyio

from orderbus._core.message import Incoming
from orderbus._core.naming import nearest
from orderbus._core.parked import Parked, Wanted
from orderbus._core.settings import Settings, masked
from orderbus._core.signing import signing_keys
from orderbus._runtime.bus import Bus
from orderbus._runtime.dead_letters import DeadLetters, Looked, Outcome, Tally
from orderbus._runtime.opening import open_broker, scheme_of
from orderbus.cli.audit import Audit, ask
from orderbus.cli.exits import complain
from orderbus.cli.loading import environment_settings, load_bus, settings_of
from orderbus.cli.output import console, plain, print_json
from orderbus.errors import UsageError

T = TypeVar("T")


class Found:
    """The queues that were named, the broker they are on, and the buses among the names."""

    def __init__(self, settings: Settings, names: Sequence[str], buses: Sequence[Bus]) -> None:
        self.settings = settings
        self.names = names
        self.buses = buses


def find_queues(targets: Sequence[str]) -> Found:
    """Raises UsageError where none is named, or they are not on one broker."""
    if not targets:
        raise UsageError("name a bus as MODULE:BUS, for all its queues, or a queue with --queue NAME", code="OB610")
    settings: Settings | None = None
    names: dict[str, None] = {}
    buses: list[Bus] = []
    for target in targets:
        if ":" not in target:
            names[target if target.endswith(".dlq") or target == "ob.lost" else f"{target}.dlq"] = None
            continue
        bus = load_bus(target)
        of_bus = settings_of(bus)
        if settings is not None and settings.broker_url != of_bus.broker_url:
            raise UsageError(
                f"{target} is on another broker ({masked(of_bus.broker_url or '')}); look at one broker at a time", code="OB607"
            )
        settings = of_bus
        buses.append(bus)
        for handler in bus.handlers:
            names[f"{handler.queue}.dlq"] = None
    if not names:
        raise UsageError(f"{', '.join(targets)}: has no handlers, and so no queues", code="OB606")
    return Found(settings or environment_settings(), list(names), buses)


def on_each(found: Found, work: Callable[[DeadLetters, str], Awaitable[T]]) -> list[T]:
    """Run the work on every queue, on one connection. That all of them exist is seen before the work on the first begins."""

    async def run() -> list[T]:
        async with opened(found.settings) as (broker, letters):
            for name in found.names:
                await _look_whether_it_is_there(broker, name, found.buses)
            return [await work(letters, name) for name in found.names]

    return anyio.run(run)


async def _look_whether_it_is_there(broker: Any, name: str, buses: Sequence[Bus]) -> None:
    try:
        await broker.depth(name)
    except UsageError as error:
        near = nearest(name, [f"{handler.queue}.dlq" for bus in buses for handler in bus.handlers])
        if near is None or near == name:
            raise
        raise UsageError(f"{error.text}; did you mean {near}?", code=error.code) from None


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[tuple[Any, DeadLetters]]:
    assert settings.broker_url is not None
    if scheme_of(settings.broker_url) == "memory":
        raise UsageError(
            "ORDERBUS_BROKER_URL is memory://: its messages live inside the process that runs the bus, out of reach for any other; "
            "to look after dead letters from outside, run on RabbitMQ",
            code="OB608",
        )
    async with open_broker(settings.broker_url, name="orderbus dlq") as broker:
        yield broker, DeadLetters(broker, window_s=settings.dedupe_window_s, signing=signing_keys(settings.signing_keys))


def ask_about(verb: str, found: Found, wanted: Wanted, *, limit: int | None, hold: int) -> None:
    """Count what it is about, say so, and go on only with a yes; without a question where it is about nothing."""

    matching = dict.fromkeys(found.names, 0)

    async def count(letters: DeadLetters, name: str) -> Looked:
        def add(some: Sequence[Incoming]) -> None:
            matching[name] += len(some)

        looked = await letters.visit(name, add, wanted, limit=limit, hold=hold)
        await letters.returned(name, looked.ready)
        return looked

    counted = on_each(found, count)
    if not any(matching.values()):
        return
    about = []
    for looked in counted:
        is_all = looked.looked_at == looked.ready or (limit is not None and matching[looked.queue] >= limit)
        more = "" if is_all else f" (the first {looked.looked_at} were looked at)"
        about.append(f"{matching[looked.queue]} of {looked.ready} letters in {looked.queue}{more}")
    ask(f"{verb} {', '.join(about)}?")


def teller(as_json: bool, dry_run: bool, audit: Audit, *, new_id: UUID | None = None) -> Callable[[Parked, Outcome, str], None]:
    """Says on stdout what became of each letter, and writes it down where something was done."""
    also = {} if new_id is None else {"new_id": str(new_id)}

    def tell(letter: Parked, outcome: Outcome, why: str) -> None:
        if not dry_run:
            audit(outcome.value, queue=letter.queue, to=letter.origin, id=letter.event_id, why=why or None, **also)
        if as_json:
            print_json(
                {
                    "event": outcome.value,
                    "id": letter.event_id,
                    "queue": letter.queue,
                    "to": letter.origin,
                    "why": why or None,
                    **also,
                }
            )
        elif dry_run or outcome in (Outcome.REFUSED, Outcome.FAILED):
            name = letter.event_id or "a letter without an id"
            console().print(plain(f"{outcome.value}: {name} in {letter.queue}{f': {why}' if why else ''}"), soft_wrap=True)

    return tell


def print_tally(done: Tally, as_json: bool, *, limited: bool = False) -> None:
    counts: dict[str, Any] = {outcome.value: count for outcome, count in done.counts.items()}
    if as_json:
        print_json({"event": "done", "queue": done.queue, "ready": done.ready, "looked_at": done.looked_at, **counts})
    else:
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        console().print(f"{done.queue}: {said or 'nothing to do'}; it held {done.ready}")
    if done.looked_at < done.ready and not limited:
        complain(f"{done.queue}: {done.looked_at} of {done.ready} letters were looked at; run again, or raise --hold")
