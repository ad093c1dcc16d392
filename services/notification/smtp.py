"""Notices by mail, over one connection that is kept open; the event's id makes the Message-ID."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import EmailMessage
from urllib.parse import parse_qs, unquote, urlsplit

import aiosmtplib

from orderbus import UnavailableError
from services.notification.senders import Notice, Refused

TIMEOUT_S = 10.0
"""How long connecting may take, and each answer."""
TURN_S = 10.0
"""How long a notice waits for those before it. With a slow server many do at once, and that is no failure of theirs."""
SEND_S = 30.0
"""How long a mail may take. With connecting and the wait it stays well below the handlers' limit: what was begun is not cut off by it."""
DOMAIN = "orders.example"


@asynccontextmanager
async def open_smtp(url: str) -> AsyncIterator[Smtp]:
    """`smtp://user:password@host:port?to=address`; without `to`, mail goes to the customer's number at the demo's domain.

    Connects at the first notice, so that a mail server that is away at start keeps nobody from starting.
    """
    smtp = Smtp(url)
    try:
        yield smtp
    finally:
        smtp.close()


class Smtp:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._to = parse_qs(parts.query).get("to", [None])[0]
        self._place = f"mail server {parts.hostname}:{parts.port or aiosmtplib.smtp.SMTP_PORT}"
        self._client = aiosmtplib.SMTP(
            hostname=parts.hostname,
            port=parts.port,
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            local_hostname=DOMAIN,
            timeout=TIMEOUT_S,
        )
        self._turn = asyncio.Lock()

    async def send(self, notice: Notice) -> None:
        """Raises Refused for a permanent (5xx) answer to the mail itself; every other failure is raised as it is, and tried again.

        Raises UnavailableError only where nothing was sent yet.
        """
        await self._wait_for_turn()
        try:
            await self._converse(self._mail(notice))
        except BaseException:
            self._client.close()  # in the middle of a conversation it is of no use to the next
            raise
        finally:
            self._turn.release()

    async def _wait_for_turn(self) -> None:
        try:
            async with asyncio.timeout(TURN_S):
                await self._turn.acquire()
        except TimeoutError as error:
            raise UnavailableError(f"{self._place}: busy with other mails for {TURN_S:g} s") from error

    async def _converse(self, mail: EmailMessage) -> None:
        if not self._client.is_connected:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await self._client.connect()
            except OSError as error:  # what aiosmtplib raises for a connection that fails, or stays silent, is one too
                raise UnavailableError(f"{self._place}: {str(error) or f'not connected in {TIMEOUT_S:g} s'}") from error
        try:
            async with asyncio.timeout(SEND_S) as limit:
                await self._client.send_message(mail)
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(f"{self._place}: not sent in {SEND_S:g} s") from error
            raise
        except aiosmtplib.SMTPRecipientsRefused as error:
            raise _refused_if_permanent(error.recipients[0]) from error
        except aiosmtplib.SMTPDataError as error:
            raise _refused_if_permanent(error) from error

    def close(self) -> None:
        """Without a farewell: every mail so far has its answer."""
        self._client.close()

    def _mail(self, notice: Notice) -> EmailMessage:
        mail = EmailMessage()
        mail["From"] = f"orders@{DOMAIN}"
        mail["To"] = self._to or f"{notice.customer_id}@{DOMAIN}"
        mail["Subject"] = notice.subject
        mail["Message-ID"] = f"<{notice.id}@{DOMAIN}>"
        mail.set_content(notice.text)
        return mail


def _refused_if_permanent(error: aiosmtplib.SMTPResponseException) -> Exception:
    return Refused(f"{error.code} {error.message}") if 500 <= error.code < 600 else error
