"""Which rights a bus needs on the tables of orderbus, and which of them its role has not."""

from __future__ import annotations

import re

from orderbus.adapters.postgres.store import open_store

__all__ = ["BUS", "RELAY", "missing_rights"]

BUS = {
    "schema_version": "select",
    "consumer": "select, insert, update (window_s, seen_at)",
    "inbox": "select, insert, delete",
    "outbox": "insert",
    "scheduled": "insert",
    "outbox_id_seq": "usage",
}
RELAY = {
    "schema_version": "select",
    "outbox": "select, insert, delete",
    "scheduled": "select, update, delete",
    "stuck": "select, insert, update, delete",
    "relay": "select, insert, update, delete",
    "lease": "select, insert, update, delete",
    "outbox_id_seq": "select, usage",
}


async def missing_rights(url: str, *, relays: bool) -> list[str]:
    """Such as `insert on orderbus.outbox`. The schema must be there. Raises UnavailableError and UsageError."""
    wanted = {
        (name, right)
        for rights in (BUS, RELAY if relays else {})
        for name, listed in rights.items()
        for right in re.split(r", (?![^(]*\))", listed)
    }
    names, rights = zip(*sorted(wanted), strict=True)
    async with open_store(url, name="orderbus check", pool_size=1) as store:
        transaction = await store.begin()
        try:
            rows, _ = await transaction.execute(_MISSING, (list(names), list(rights)))
        finally:
            await transaction.rollback()
    return [f"{right} on orderbus.{name}" for name, right in rows]


_MISSING = """\
select name, wanted from unnest(%s::text[], %s::text[]) as needed (name, wanted)
where not case name when 'outbox_id_seq' then has_sequence_privilege('orderbus.' || name, wanted)
    when 'consumer' then has_any_column_privilege('orderbus.' || name, split_part(wanted, ' (', 1))
    else has_table_privilege('orderbus.' || name, wanted) end
order by name, wanted"""
