"""PostgreSQL: transactions, the inbox, the outbox, and their schema. Needs `orderbus[postgres]`; speaks asyncio only, but for BlockingOutbox."""

from orderbus.adapters.postgres.blocking import BlockingOutbox
from orderbus.adapters.postgres.desk import PostgresDesk, open_desk
from orderbus.adapters.postgres.errors import classify
from orderbus.adapters.postgres.pool import where_of
from orderbus.adapters.postgres.schema import apply, check, schema_sql
from orderbus.adapters.postgres.store import PostgresStore, open_store

__all__ = [
    "BlockingOutbox",
    "PostgresDesk",
    "PostgresStore",
    "apply",
    "check",
    "classify",
    "open_desk",
    "open_store",
    "schema_sql",
    "where_of",
]
