"""PostgreSQL: transactions, the inbox, the outbox, and their schema. Needs `orderbus[postgres]`; speaks asyncio only."""

from orderbus.adapters.postgres.schema import apply, check, schema_sql
from orderbus.adapters.postgres.store import PostgresStore, open_store

__all__ = ["PostgresStore", "apply", "check", "open_store", "schema_sql"]
