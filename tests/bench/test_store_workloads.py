"""The workloads with a store: what they count at the end, and the rows that they make. No peer runs."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest

from bench import database, peers, wire
from bench.child import Report
from bench.ground import Ground
from bench.job import Job, Sample, samples
from bench.peers import PEERS
from bench.workloads import Count, backlog, effect, outbox, relay, workloads

REPORT = Report(seconds=1.0, count=1)
ALL_EXCEPT_2_AND_5_TWICE = (0, 1, 3, 4, 5, 5)


@pytest.fixture
def ground(vhost_url: str, database_url: str) -> Ground:
    return Ground(vhost_url, database_url, "")


def job_for(ground: Ground, workload: str, peer: str, **options: Any) -> Job:
    return Job(
        workload=workload,
        variant="",
        peer=peer,
        topic=ground.topic(),
        count=6,
        body_bytes=250,
        broker_url=ground.broker_url,
        database_url=ground.database_url,
        options=options,
    )


def write_rows(ground: Ground, table: str, job: Job, numbers: Iterable[int]) -> None:
    of = list(samples(job))
    with psycopg.connect(ground.database_url, autocommit=True) as connection:
        for number in numbers:
            row = msgspec.structs.astuple(of[number])
            connection.execute(
                f"insert into {table} (number, order_id, customer_id, total_cents, note) values (%s, %s, %s, %s, %s)", row
            )


def publish(ground: Ground, queue: str, job: Job, numbers: Iterable[int]) -> None:
    of, envelope = list(samples(job)), wire.Envelope("", queue, job.topic)
    with wire.Wire(ground.broker_url) as connection:
        connection.confirms()
        bodies = [msgspec.json.encode(of[number]) for number in numbers]
        connection.publish([envelope.frames(wire.event_id(0), str(of[0].order_id), body) for body in bodies])
        connection.confirmed_up_to(len(bodies), 0)


@pytest.mark.servers
def test_an_order_that_is_missing_and_an_event_that_came_twice_are_counted(ground: Ground) -> None:
    job = job_for(ground, "outbox", "orderbus")
    outbox.prepare(ground, job)
    write_rows(ground, f"{job.topic}_orders", job, (0, 1, 2, 3, 4))
    ground.execute(database.waiting_in_orderbus(job, range(6)))
    ground.execute(database.waiting_in_orderbus(job, range(3, 4)))

    assert outbox.verify(ground, job, REPORT) == Count(lost=1, doubled=1)


@pytest.mark.servers
def test_no_job_finds_the_rows_of_the_one_before(ground: Ground) -> None:
    first = job_for(ground, "outbox", "orderbus")
    outbox.prepare(ground, first)
    ground.execute(database.waiting_in_orderbus(first, range(6)))
    second = job_for(ground, "outbox", "orderbus")
    outbox.prepare(ground, second)

    assert outbox.verify(ground, second, REPORT) == Count(lost=12)


@pytest.mark.servers
def test_an_effect_and_an_output_event_count_each_by_themselves(ground: Ground) -> None:
    job = job_for(ground, "effect", "by-hand")
    effect.prepare(ground, job)
    write_rows(ground, f"{job.topic}_effect", job, ALL_EXCEPT_2_AND_5_TWICE)
    publish(ground, f"{job.queue}.done", job, ALL_EXCEPT_2_AND_5_TWICE)
    with wire.Wire(ground.broker_url) as connection:
        connection.declare(job.queue)
    publish(ground, job.queue, job, (2,))

    assert effect.verify(ground, job, REPORT) == Count(lost=2, doubled=2, left=1)


@pytest.mark.servers
def test_a_row_that_was_not_relayed_and_a_message_that_came_twice_are_counted(ground: Ground) -> None:
    job = job_for(ground, "relay", "orderbus")
    relay.prepare(ground, job)
    ground.execute("delete from orderbus.outbox where id <> (select min(id) from orderbus.outbox)")
    publish(ground, job.queue, job, ALL_EXCEPT_2_AND_5_TWICE)

    assert relay.verify(ground, job, REPORT) == Count(lost=1, doubled=1, left=1)


@pytest.mark.servers
@pytest.mark.parametrize(
    ("published", "waiting", "expected"),
    [
        ((0, 1, 2), range(3, 6), Count()),
        ((0, 1), range(3, 6), Count(lost=1)),
        ((0, 1, 2, 2), range(3, 6), Count(doubled=1)),
        ((0, 1, 2, 3), range(3, 6), Count(doubled=1)),
    ],
)
def test_what_the_relay_published_and_what_still_waits_must_be_each_row_once(
    ground: Ground, published: tuple[int, ...], waiting: range, expected: Count
) -> None:
    job = job_for(ground, "backlog", "orderbus", what="relay", behind=0)
    backlog.prepare(ground, job)
    ground.execute(database.waiting_in_orderbus(job, waiting))
    publish(ground, job.queue, job, published)

    assert backlog.verify(ground, job, REPORT) == expected


@pytest.mark.servers
@pytest.mark.parametrize(("handled", "expected"), [(4, Count()), (3, Count(lost=1)), (5, Count(doubled=1))])
def test_what_was_handled_and_what_still_waits_must_be_each_message_once(ground: Ground, handled: int, expected: Count) -> None:
    job = job_for(ground, "backlog", "orderbus", what="consume", behind=0)
    with wire.Wire(ground.broker_url) as connection:
        connection.declare(job.queue)
    publish(ground, job.queue, job, (4, 5))
    database.orderbus_tables(ground)

    report = Report(seconds=1.0, count=4, more={"handled": handled})
    assert backlog.verify(ground, job, report) == expected


@pytest.mark.servers
def test_a_row_made_in_the_server_holds_what_a_message_holds(ground: Ground) -> None:
    job = job_for(ground, "relay", "orderbus")
    relay.prepare(ground, job)
    with psycopg.connect(ground.database_url) as connection:
        rows = connection.execute("select id, event_id, bucket, topic, key, body from orderbus.outbox order by id").fetchall()

    bodies = [msgspec.json.decode(row[5], type=Sample) for row in rows]
    assert [body.number for body in bodies] == list(range(job.count))
    assert [row[4] for row in rows] == [str(body.order_id) for body in bodies]
    assert {row[3] for row in rows} == {job.topic}
    assert {UUID(str(row[1])).version for row in rows} == {7}
    assert len({row[1] for row in rows}) == job.count
    assert all(0 <= row[2] < 64 for row in rows)
    sizes = [len(msgspec.json.encode(sample)) for sample in samples(job)]
    assert all(abs(len(row[5]) - size) <= 4 for row, size in zip(rows, sizes, strict=True))


def test_every_peer_of_a_workload_has_a_program_for_it() -> None:
    missing = [
        f"{workload.name}: {peer}"
        for workload in workloads().values()
        if workload.measure is None
        for peer in workload.peers
        if workload.name not in _programs(PEERS[peer].module)
    ]
    assert missing == []


def _programs(module: str) -> set[str]:
    """The keys of the dict that a peer's module gives to `main`, read without importing its libraries."""
    folder = Path(inspect.getfile(peers)).parent
    for node in ast.walk(ast.parse((folder / f"{module}.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "main":
            (programs,) = (argument for argument in node.args if isinstance(argument, ast.Dict))
            return {key.value for key in programs.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return set()
