"""What a job has in the database: tables named after its topic, made before it and dropped after it, and orderbus's own, emptied."""

from __future__ import annotations

import os
import subprocess
import sys

from bench.ground import Ground, Missing
from bench.job import Job, note_length

CONNECTIONS = 20
"""Of each program to the database, where it writes with many at once."""

_ORDERBUS_TABLES = ("outbox", "scheduled", "stuck", "relay", "lease", "inbox")
_ROW = (
    "number integer not null, order_id uuid not null, customer_id uuid not null, total_cents integer not null, note text not null"
)


def orderbus_tables(ground: Ground) -> None:
    """Make them, once a run, and empty them: no job pays for the rows of another."""
    if not ground.number("select count(*) from pg_namespace where nspname = 'orderbus'"):
        done = subprocess.run(
            [sys.executable, "-m", "orderbus", "schema", "apply"],
            env={**os.environ, "ORDERBUS_DATABASE_URL": ground.database_url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise Missing(f"orderbus schema apply: {(done.stderr or done.stdout).strip()}")
    ground.execute("truncate " + ", ".join(f"orderbus.{name}" for name in _ORDERBUS_TABLES))


def rows_table(ground: Ground, name: str) -> None:
    """For the rows that a job's program writes. Nothing in it is unique but its id, so that a row that was written twice shows."""
    ground.execute(f"create table {name} (id bigint generated always as identity primary key, {_ROW})")


def inbox_table(ground: Ground, name: str) -> None:
    """For a program that keeps its own inbox."""
    ground.execute(f"create table {name} (event_id uuid primary key, handled_at timestamptz not null default now())")


def outbox_table(ground: Ground, name: str) -> None:
    """For a program that keeps its own outbox."""
    ground.execute(
        f"create table {name} (id bigint generated always as identity primary key, event_id uuid not null, topic text not null, "
        "key text not null, body bytea not null, created_at timestamptz not null default now())"
    )


def drop(ground: Ground, *names: str) -> None:
    ground.execute(f"drop table if exists {', '.join(names)}")


def numbers_in(column: str) -> str:
    """SQL for the number in a body."""
    return f"(convert_from({column}, 'UTF8')::json ->> 'number')::integer"


def missing_and_again(ground: Ground, query: str, count: int) -> tuple[int, int]:
    """Of the numbers that a query answers: how many of 0 to count-1 are missing, and how many came again."""
    found = ground.number(
        f"select count(distinct number) from ({query}) as found (number) where number between 0 and {count - 1}"
    )
    return count - found, ground.number(f"select count(*) from ({query}) as found (number)") - found


def waiting_in_orderbus(job: Job, numbers: range) -> str:
    """SQL that puts events of the job's topic into orderbus's outbox, as many committed transactions would have.

    Made in the server, a million take seconds. The transaction gets its id before the rows get theirs, as orderbus's own insert has
    it. A bucket is any of the 64: only who reads a key in order asks which. There is no percent sign in it, which would need doubling
    where there are parameters.
    """
    return f"""\
with me as materialized (select pg_current_xact_id() as xid)
insert into orderbus.outbox (bucket, event_id, topic, key, body, content_type, headers, unrouted)
select mod(number, 64), (time_ms || '7' || substr(digest, 1, 3) || '8' || substr(digest, 4, 15))::uuid,
    '{job.topic}', order_id, body, 'application/json', '{{}}', 'keep'
from me, lateral ({_bodies(job, numbers)}) as bodies, lpad(to_hex((extract(epoch from now()) * 1000)::bigint), 12, '0') as time_ms
where me.xid is not null
order by number"""


def waiting_in_faststream_outbox(job: Job, numbers: range) -> str:
    """The same bodies in the job's table of faststream-outbox, with the headers that its publish writes."""
    return f"""\
insert into {job.topic}_outbox (queue, payload, headers)
select '{job.topic}', body, jsonb_build_object('content-type', 'application/json', 'correlation_id', order_id)
from ({_bodies(job, numbers)}) as bodies order by number"""


def _bodies(job: Job, numbers: range) -> str:
    """The fields of `bench.job.Sample`; ids that look random, and are the same for everyone."""
    return f"""\
select number, order_id, digest, convert_to(
    '{{"number":' || number || ',"order_id":"' || order_id || '","customer_id":"' || md5('customer' || number)::uuid
    || '","total_cents":' || mod(number, 100000) || ',"note":"' || repeat('x', {note_length(job.body_bytes)}) || '"}}', 'UTF8') as body
from (select number, md5('order' || number)::uuid::text as order_id, md5('event' || number) as digest
    from generate_series({numbers[0]}, {numbers[-1]}) as number) as ids"""
