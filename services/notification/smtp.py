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
        """Raises Refused for a permanent (5xx) answer to the mail itself; every other failure is raised as it is, and tried again."""
        async with self._turn:
            try:
                await self._converse(self._mail(notice))
            except BaseException:
                self._client.close()  # in the middle of a conversation it is of no use to the next
                raise

    async def _converse(self, mail: EmailMessage) -> None:
        if not self._client.is_connected:
            try:
                await self._client.connect()
            except OSError as error:  # what aiosmtplib raises for a connection that fails, or stays silent, is one too
                raise UnavailableError(f"{self._place}: {error}") from error
        try:
            await self._client.send_message(mail)
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
