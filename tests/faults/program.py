"""What the fault matrix runs as processes of their own: `python -m tests.faults.program ROLE`.

Roles: `producer`, which commits numbered events, some by group commit and some for later, and rolls some back; `relay`; `service`,
which writes a row for each event and emits another; `trail`, which is told them in the order of each key; and `notify`, which is
guarded by Redis alone. FAULTS_FAILPOINT names a point of tests/faults/failpoints.py at which the process kills itself.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import math
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import anyio
import psycopg

from orderbus import Batch, Bus, Delivery, Event, Park, Retry, Settings, Tx
from tests.faults import failpoints
from tests.faults.ledger import APPLIED, LATER, PLACED, PRODUCED_BELOW, REMINDED_EVERY, Place

KEYS = 200
PER_TRANSACTION = REMINDED_EVERY
TOGETHER = 4
"""So many transactions of a part each, where they share one by group commit."""
ROLLED_BACK = PRODUCED_BELOW
"""Events with this number and above belong to transactions that were rolled back: whoever sees one has seen a ghost."""
PARKS, FAILS_ONCE, FAILS_TWICE = "parks", "fails once", "fails twice"
KILLS = "kills"
READY = "READY"
UNCLEAN = 3
"""The exit code of a drain that had to cancel work, or could not settle all of it."""
LATE_S = 0.1
FUSE = 50
LANES, PREFETCH = int(os.environ.get("FAULTS_LANES", "4")), int(os.environ.get("FAULTS_PREFETCH", "0")) or None
"""How many units `notify` may have in hand at once, and how many messages (None: the library's default)."""


class Placed(Event, topic="faults.placed", key="key"):
    n: int
    key: str
    seq: int
    does: str = ""


class Applied(Event, topic="faults.applied", key="key"):
    n: int
    key: str


class Later(Event, topic="faults.later", key="key"):
    """Emitted with the first event of each transaction, and due a second after it."""

    n: int
    key: str


class Flaky(Exception):
    """A failure that passes."""


QUICK = Retry.exponential(first=0.2, limit=1.0, attempts=6)

producer = Bus("faults-producer", settings=Settings(relay=False))
relay = Bus("faults-relay")
service = Bus("faults", settings=Settings(relay=False))
trail = Bus("faults-trail", settings=Settings(relay=False))
notify = Bus("faults-notify", settings=Settings(relay=False))


@service.on(Placed, fuse=50, concurrency=4, retry=QUICK)
async def apply(event: Placed, tx: Tx, delivery: Delivery) -> Applied:
    if event.does == PARKS:
        raise Park("asked-for")
    if event.does == KILLS:
        failpoints.die()
    if delivery.attempt <= {FAILS_ONCE: 1, FAILS_TWICE: 2}.get(event.does, 0):
        raise Flaky(event.does)
    await write(tx, "insert into effect (n, which) select n, 'placed' from unnest(%s::bigint[]) g (n)", event.n)
    return Applied(n=event.n, key=event.key)


@service.on(Applied, fuse=50, concurrency=4, retry=QUICK)
async def count(event: Applied, tx: Tx) -> None:
    await write(tx, "insert into effect (n, which) select n, 'applied' from unnest(%s::bigint[]) g (n)", event.n)


@service.on_batch(Later, most=50, concurrency=2, retry=QUICK)
async def remind(batch: Batch[Later], tx: Tx) -> None:
    for event in batch.events:
        await write(tx, "insert into effect (n, which) select n, 'later' from unnest(%s::bigint[]) g (n)", event.n)


@trail.on(Placed, ordered=True, fuse=50, concurrency=4)
async def follow(event: Placed, tx: Tx) -> None:
    await write(
        tx,
        "insert into trail (key, seq, n) select key, seq, n from unnest(%s::text[], %s::bigint[], %s::bigint[]) g (key, seq, n)",
        event.key,
        event.seq,
        event.n,
    )


async def write(tx: Tx, sql: str, *row: object) -> None:
    """At commit with all others, or at once where a failpoint is about that."""
    if failpoints.writes_at_once:
        await tx.execute(sql, [[value] for value in row])
    else:
        tx.defer_row(sql, row)


@notify.on(Placed, guard="claims", concurrency=LANES, fuse=FUSE, prefetch=PREFETCH, timeout=2.0)
async def note(event: Placed) -> None:
    """An outside effect: it stays when the process dies, and no transaction guards it."""
    os.write(notes(), f"{event.n}\n".encode())


@functools.cache
def notes() -> int:
    return os.open(os.environ["FAULTS_NOTES"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)


async def produce(rate: float, first: int, seed: int) -> None:
    """Until SIGTERM; from SIGUSR1 on as fast as it can.

    Each number in `source` was committed with its event; each key's `seq` counts its commits, under the key's lock.
    """
    rng = random.Random(seed)
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
        async with producer, anyio.create_task_group() as group:
            print(READY, flush=True)
            hurried, stopped = anyio.Event(), anyio.Event()
            group.start_soon(_wait_for_signals, signals, hurried, stopped)
            due, n = time.monotonic(), first
            while not stopped.is_set():
                rate = math.inf if hurried.is_set() else rate
                keys = sorted(rng.sample(range(KEYS), PER_TRANSACTION))
                await place(range(n, n + PER_TRANSACTION), keys, together=rng.random() < 0.25)
                n += PER_TRANSACTION
                if rng.random() < 0.05:
                    await roll_back(ROLLED_BACK + n, at_commit=rng.random() < 0.5)
                due = max(
                    due + PER_TRANSACTION / rate, time.monotonic() - LATE_S
                )  # what an outage kept back does not come at once
                await anyio.sleep(max(due - time.monotonic(), 0))


async def _wait_for_signals(signals: AsyncIterator[signal.Signals], hurried: anyio.Event, stopped: anyio.Event) -> None:
    async for number in signals:
        hurried.set()
        if number is signal.SIGTERM:
            stopped.set()
            return


async def place(numbers: range, keys: Sequence[int], *, together: bool) -> None:
    """In a transaction, or in parts that share one (or two, for a bus has two lanes), until it is committed. No key is in two parts."""
    if not together:
        await again_and_again(lambda: _alone(numbers, keys))
        return
    size = len(numbers) // TOGETHER
    async with anyio.create_task_group() as parts:
        for at in range(0, len(numbers), size):
            work = functools.partial(_place, numbers=numbers[at : at + size], keys=keys[at : at + size])
            parts.start_soon(again_and_again, functools.partial(producer.group_commit, work))


async def _alone(numbers: range, keys: Sequence[int]) -> None:
    async with producer.transaction() as tx:
        await _place(tx, numbers, keys)


async def _place(tx: Tx, numbers: range, keys: Sequence[int]) -> None:
    [(due_at, is_there)] = await tx.fetch_all(
        "select now() + interval '1 s', exists (select from source where n = %s)", (numbers[0],)
    )
    if is_there:
        return  # the commit of an earlier try had taken place
    rows = await tx.fetch_all(
        "insert into key (key, seq) select 'k' || k, 1 from unnest(%s::int[]) k order by k"
        " on conflict (key) do update set seq = key.seq + 1 returning key, seq",
        (list(keys),),
    )
    placed = []
    for n, (key, seq) in zip(numbers, rows, strict=True):
        event = Placed(n=n, key=str(key), seq=int(seq), does=does(n))
        tx.emit(event)
        placed.append((n, event.key, event.seq, event.does))
        if n % REMINDED_EVERY == 0:
            tx.emit(Later(n=n, key=event.key), due_at=due_at)
    await tx.execute(
        "insert into source (n, key, seq, does) select * from unnest(%s::bigint[], %s::text[], %s::bigint[], %s::text[])",
        tuple(list(column) for column in zip(*placed, strict=True)),
    )


def does(n: int) -> str:
    """What an event makes its handler do; by its number, so that a second try of its transaction makes the same event."""
    if str(n) == os.environ.get("FAULTS_KILLER"):
        return KILLS
    if n % 1000 == 500:
        return PARKS
    if n % 400 == 200:
        return FAILS_ONCE
    return FAILS_TWICE if n % 1000 == 700 else ""


async def again_and_again(work: Callable[[], Awaitable[None]]) -> None:
    """Until it is done: what a caller does whose server is away."""
    while True:
        try:
            await work()
            return
        except Exception as error:
            logging.warning("producing: %r; again", error)
            await anyio.sleep(0.1)


class GivenUp(Exception):
    """Rolls a transaction back."""


async def roll_back(n: int, *, at_commit: bool) -> None:
    """By an exception, before anything of the event has left the process; or by the COMMIT itself, which comes after its row."""
    try:
        async with producer.transaction() as tx:
            tx.emit(Placed(n=n, key="ghost", seq=0))
            if not at_commit:
                raise GivenUp
            await tx.execute("insert into doomed (n) values (%s)", (n,))
    except Exception as error:
        if not isinstance(error, (GivenUp, psycopg.errors.ForeignKeyViolation)):
            logging.warning("rolling back: %r", error)


PARKED = {PARKS: Place(f"{PLACED}.dlq", "asked-for"), KILLS: Place(f"{PLACED}.dlq", "delivery-limit")}
"""Where an event ends up, by what it makes its handler do."""
BUSES = {"relay": relay, "service": service, "trail": trail, "notify": notify}
QUEUES = {
    "service": [PLACED, APPLIED, LATER],
    "trail": ["faults-trail.ordered"],
    "notify": ["faults-notify.faults.placed"],
}


async def run(bus: Bus) -> int:
    """Until SIGTERM; the exit code, as `orderbus run` has it. SIGUSR1 has it say how many tasks and blocks of memory it holds."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
        async with bus:
            print(READY, flush=True)
            async for number in signals:
                if number is signal.SIGTERM:
                    break
                gc.collect()
                print(f"HOLDS {len(asyncio.all_tasks())} {sys.getallocatedblocks()}", flush=True)
    print(bus.receipt, flush=True)
    return 0 if bus.receipt is not None and bus.receipt.clean else UNCLEAN


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    failpoints.arm()
    if sys.argv[1] == "producer":
        rate, first, number = (os.environ[f"FAULTS_{name}"] for name in ("RATE", "FIRST", "SEED"))
        anyio.run(produce, float(rate), int(first), int(number))
    else:
        sys.exit(anyio.run(run, BUSES[sys.argv[1]]))
