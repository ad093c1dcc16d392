"""What a sender is, and how NOTIFY_URL chooses one. The sender's own library is imported only where it is chosen."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol
from urllib.parse import urlsplit
from uuid import UUID

import msgspec

from orderbus import SettingsError

log = logging.getLogger("services.notification")


class Notice(msgspec.Struct, frozen=True):
    """A message to a customer. `id` is its event's, and the idempotency key for whoever takes it."""

    id: UUID
    customer_id: UUID
    subject: str
    text: str


class Refused(Exception):
    """The other side will never take this notice: trying again would not change it."""


class Sender(Protocol):
    async def send(self, notice: Notice) -> None:
        """Raises Refused for what can never be sent, UnavailableError when nobody is there, another exception otherwise."""


@asynccontextmanager
async def open_sender(url: str) -> AsyncIterator[Sender]:
    """Raises SettingsError for a URL that names no sender."""
    kind, _, rest = url.partition(":")
    if kind == "console":
        yield Console()
    elif kind == "null":
        yield Null()
    elif kind == "webhook" and urlsplit(rest).scheme in ("http", "https"):
        from services.notification.webhook import open_webhook

        async with open_webhook(rest) as webhook:
            yield webhook
    elif kind == "smtp" and urlsplit(url).hostname:
        from services.notification.smtp import open_smtp

        async with open_smtp(url) as smtp:
            yield smtp
    else:
        raise SettingsError(["NOTIFY_URL: must be console:, null:, smtp://host:port?to=address or webhook:http://…"])


class Console:
    """A line in the log for each notice."""

    async def send(self, notice: Notice) -> None:
        log.info("to customer %s: %s (%s)", notice.customer_id, notice.text, notice.id)


class Null:
    """Sends nothing: for load tests of everything else."""

    async def send(self, notice: Notice) -> None:
        return None
