"""Notices by HTTP: a POST of JSON, with the event's id as its Idempotency-Key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec

from orderbus import UnavailableError
from services.notification.senders import Notice, Refused

TIMEOUT_S = 10.0
TURN_S = 10.0
"""How long a notice waits for a connection. With a slow webhook many do at once, and that is no failure of theirs."""
MOST_CONNECTIONS = 20
WORTH_ANOTHER_TRY = frozenset({408, 425, 429})
"""Of the answers that blame the request, those that another try may change."""


@asynccontextmanager
async def open_webhook(url: str) -> AsyncIterator[Webhook]:
    """Connections are kept open and shared."""
    limits = httpx.Limits(max_connections=MOST_CONNECTIONS)
    async with httpx.AsyncClient(timeout=httpx.Timeout(TIMEOUT_S, pool=TURN_S), limits=limits) as client:
        yield Webhook(client, url)


class Webhook:
    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url

    async def send(self, notice: Notice) -> None:
        """2xx is success; 5xx, 408, 425 and 429 are tried again; every other answer raises Refused.

        Raises UnavailableError only where nothing was sent yet.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": str(notice.id)}
        try:
            response = await self._client.post(self._url, content=msgspec.json.encode(notice), headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnavailableError(f"webhook: can't connect: {str(error) or f'no answer in {TIMEOUT_S:g} s'}") from error
        except httpx.PoolTimeout as error:
            raise UnavailableError(f"webhook: all {MOST_CONNECTIONS} connections are busy for {TURN_S:g} s") from error
        if response.is_success:
            return
        if response.is_server_error or response.status_code in WORTH_ANOTHER_TRY:
            response.raise_for_status()
        raise Refused(f"the webhook answered {response.status_code}")
