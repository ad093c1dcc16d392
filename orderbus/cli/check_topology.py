"""What `orderbus check` says of the broker's exchanges, queues and bindings."""

from __future__ import annotations

import importlib

from orderbus._core.settings import Settings
from orderbus._core.topology_plan import Change
from orderbus._runtime.bus import Bus
from orderbus._runtime.opening import adapter
from orderbus.cli.found import Seen

MOST_NAMED = 5


async def topology(settings: Settings, bus: Bus) -> list[Seen]:
    """Every difference, and what is missing as one note. Changes nothing."""
    url, wanted = settings.broker_url or "", bus.topology()
    module = importlib.import_module(f"{adapter(url).__name__}.drift")
    async with module.open_drift(url, name="orderbus check", management_url=settings.management_url) as drift:
        found: list[Change] = await drift.look(wanted, {bus.group})
        if settings.management_url is not None:
            found += await drift.refused(wanted)
    seen: list[Seen] = []
    if missing := [change.name for change in found if change.action == "create" and change.kind != "binding"]:
        first = sorted(dict.fromkeys(missing), key=lambda name: (name.startswith("ob."), name))[:MOST_NAMED]
        names = ", ".join(first) + (", …" if len(missing) > MOST_NAMED else "")
        seen.append(("note", f"{len(missing)} exchanges and queues are missing ({names}); `orderbus run` declares them"))
    elif unbound := [str(change) for change in found if change.action == "create"]:
        seen.append(("note", f"{len(unbound)} bindings are missing ({unbound[0]}, …); `orderbus run` declares them"))
    seen += [("finding", _finding(change)) for change in found if _is_finding(change)]
    if seen:
        return seen
    unread = "" if settings.management_url is not None else "; bindings can't be read without ORDERBUS_MANAGEMENT_URL"
    return [("ok", f"{len(wanted.queues)} queues as they should be{unread}")]


def _is_finding(change: Change) -> bool:
    return change.action in ("differs", "leftover") or (change.action == "unknown" and change.kind != "binding")


def _finding(change: Change) -> str:
    if change.action == "leftover":
        return f"{change} is left over from a handler that is gone; `orderbus topology apply --prune` removes it"
    named = f"{change.kind} {change.name!r}"
    if change.action == "unknown":
        fix = "give the user the permission to configure it, or let one who has it run `orderbus topology apply`"
        return f"{named}: the broker says {change.said!r}; {fix}"
    listed = ", ".join(f"{one.name} is {one.there!r} and should be {one.wanted!r}" for one in change.differences)
    what = listed or f"the broker says {change.said!r}"
    return f"{named}: {what}; drain and delete it, so that it can be declared anew, or go back to what it has"
