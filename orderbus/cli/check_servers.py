"""What `orderbus check` asks a server beside its version: its clock, and what the user may do."""

from __future__ import annotations

import importlib

from orderbus._core.settings import Settings
from orderbus._runtime.bus import Bus
from orderbus._runtime.opening import adapter
from orderbus.cli.found import Seen

MOST_APART_S = 2.0
"""More than that is no delay of the network, but a clock that nobody sets."""


async def clock(url: str) -> list[Seen]:
    """The clocks of the database and of Redis."""
    module = importlib.import_module(f"{adapter(url).__name__}.clock")
    return [_judged(*await module.ahead(url))]


async def broker_clock(settings: Settings) -> list[Seen]:
    """Only the management API tells it, in whole seconds."""
    url = settings.broker_url or ""
    module = importlib.import_module(f"{adapter(url).__name__}.drift")
    async with module.open_drift(url, name="orderbus check", management_url=settings.management_url) as drift:
        return [_judged(*await drift.ahead())]


async def rights(url: str, *, relays: bool) -> list[Seen]:
    module = importlib.import_module(f"{adapter(url).__name__}.rights")
    missing = await module.missing_rights(url, relays=relays)
    if not missing:
        return [("ok", "enough for a bus" + (" and its relay" if relays else ""))]
    fix = "have its owner grant them (compose/roles/postgres.sql has roles that suffice)"
    return [("finding", f"the role lacks {', '.join(missing)}; {fix}")]


async def permissions(settings: Settings, bus: Bus) -> list[Seen]:
    """Of the broker's user, beside those to declare, which are looked at with the topology."""
    url, relays = settings.broker_url or "", settings.database_url is not None and settings.relay is not False
    module = importlib.import_module(f"{adapter(url).__name__}.permissions")
    missing = await module.missing_permissions(url, bus.topology(), relays=relays)
    if not missing:
        return [("ok", "enough to consume" + (" and to relay" if relays else ""))]
    fix = "have its permissions set (compose/roles/rabbitmq.sh gives those that suffice)"
    return [("finding", f"the user may not {', '.join(missing)}; {fix}")]


def _judged(ahead_s: float, unsure_s: float) -> Seen:
    apart = f"{abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's, give or take {unsure_s:.1f} s"
    if abs(ahead_s) - unsure_s <= MOST_APART_S:
        return "ok", apart
    harm = "ids, due times and lags are wrong by that much"
    return "finding", f"{apart}: {harm}; set both by NTP (chrony, systemd-timesyncd)"
