"""RabbitMQ's management API over HTTP: the only way to read what a broker has already."""

from __future__ import annotations

import base64
import http.client
import ssl
import time
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import anyio
import anyio.to_thread
import msgspec

from orderbus.errors import UnavailableError, UsageError

LIMIT_S = 10.0
"""For each write and each read of one request."""
ANSWER_S = 30.0
"""For a request as a whole."""
MOST_BYTES = 64 * 1024 * 1024
"""An answer beyond this is refused: some 100,000 queues."""


class Management:
    """Asks with the user and password of its URL, else those given. Redirects are not followed: they would carry the password off."""

    def __init__(self, url: str, *, user: str, password: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._tls = parts.scheme == "https"
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        named = parts.username is not None
        self._user = unquote(parts.username or "") if named else user
        secret = unquote(parts.password or "") if named else password
        self._date: float | None = None
        """When the last answer was given, by the server's clock."""
        self._authorization = "Basic " + base64.b64encode(f"{self._user}:{secret}".encode()).decode()

    async def get(self, *path: str, columns: str = "") -> Any:
        """The JSON document at `/api/…`. Raises UnavailableError, and UsageError for what another setting or right would mend."""
        target = f"{self._path}/api/{'/'.join(quote(part, safe='') for part in path)}" + (
            f"?columns={columns}" if columns else ""
        )
        try:
            with anyio.fail_after(ANSWER_S):
                status, reason, body = await anyio.to_thread.run_sync(self._asked, target, abandon_on_cancel=True)
        except TimeoutError as error:
            raise UnavailableError(f"the management API at {self.shown}: no whole answer within {ANSWER_S:g} s") from error
        if status == 401:
            raise UsageError(
                f"{self.shown} refuses the user {self._user!r}: {_reason(body)}; it takes the right password, the tag `management` "
                f"and a permission in the vhost",
                code="OB509",
            )
        if status >= 500:
            raise UnavailableError(f"the management API at {self.shown} answers {status} {reason}: {_reason(body)}")
        try:
            if status != 200:
                raise UsageError(self._no_api(f"it answers {status} {reason} to {target}"), code="OB509")
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(self._no_api(f"its answer is no JSON: {error}"), code="OB509") from None

    async def ahead(self) -> tuple[float, float]:
        """By how many seconds the server's clock is ahead of this machine's, and how far off that may be: it says whole seconds."""
        before_s = time.time()
        await self.get("overview", columns="cluster_name")
        after_s = time.time()
        if self._date is None:
            raise UsageError(self._no_api("it says no date"), code="OB509")
        return self._date + 0.5 - (before_s + after_s) / 2, 0.5 + (after_s - before_s) / 2

    def _no_api(self, why: str) -> str:
        return f"ORDERBUS_MANAGEMENT_URL: {self.shown} is not RabbitMQ's management API: {why}; write http://host:15672"

    def _asked(self, target: str) -> tuple[int, str, bytes]:
        try:
            connection = (
                http.client.HTTPSConnection(self._host, self._port, timeout=LIMIT_S, context=ssl.create_default_context())
                if self._tls
                else http.client.HTTPConnection(self._host, self._port, timeout=LIMIT_S)
            )
            try:
                connection.request("GET", target, headers={"Authorization": self._authorization, "Accept": "application/json"})
                answer = connection.getresponse()
                self._date = _seconds(answer.getheader("Date"))
                body = answer.read(MOST_BYTES + 1)
                status, reason = answer.status, answer.reason
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"can't ask the management API at {self.shown}: {type(error).__name__}: {error}") from error
        if len(body) > MOST_BYTES:
            raise UsageError(f"the management API at {self.shown} answers with more than {MOST_BYTES} bytes", code="OB509")
        return status, reason, body


def _seconds(date: str | None) -> float | None:
    try:
        return None if date is None else parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def _reason(body: bytes) -> str:
    """What the API says of a refusal, in few words of unknown origin."""
    try:
        said = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return msgspec.json.decode(said["reason"], type=str)[:200]
    except (msgspec.MsgspecError, KeyError, UnicodeDecodeError):
        return "no reason is given"
