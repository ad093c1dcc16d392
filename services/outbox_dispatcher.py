"""Outbox dispatcher: the relay as a process of its own. The other services run with ORDERBUS_RELAY=false beside it."""

from __future__ import annotations

from orderbus import Bus, Settings

bus = Bus("outbox-dispatcher", settings=Settings(relay=True))
