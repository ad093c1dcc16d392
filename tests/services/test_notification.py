"""Notification: once for each event, to senders that talk to real servers."""

from __future__ import annotations

import asyncio
import email.policy
import json
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

import msgspec
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from orderbus import SettingsError, UnavailableError, new_id
from orderbus._core.message import Outgoing, Receipt
from orderbus._core.topology import EVENTS_EXCHANGE
from services import notification
from services.notification import smtp, webhook
from services.notification.senders import Notice, open_sender
from services.shared.events import OrderCancelled, OrderConfirmed
from services.shared.logs import set_up_logs
from tests.servers import free_port
from tests.services.shop import CUSTOMER, Shop, until, until_handled, until_stats

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

CONFIRMED = OrderConfirmed(order_id=UUID(int=1), customer_id=CUSTOMER, total_cents=12_345)
CANCELLED = OrderCancelled(order_id=UUID(int=2), customer_id=CUSTOMER, reason="out-of-stock")
NOTICE = Notice(UUID(int=3), CUSTOMER, "Order confirmed", "It is.")


class Mailbox:
    """An aiosmtpd handler that answers what it is told to, then 250; a mail's content once it is `open`."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.peers: set[object] = set()
        self.answers: list[str] = []
        self.recipient_answers: list[str] = []
        self.open = threading.Event()
        self.open.set()

    async def handle_RCPT(  # noqa: N802 - the name that aiosmtpd looks for
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: Sequence[str]
    ) -> str:
        if self.recipient_answers:
            return self.recipient_answers.pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        await asyncio.to_thread(self.open.wait)
        if self.answers:
            return self.answers.pop(0)
        self.peers.add(session.peer)
        content = envelope.content
        assert isinstance(content, bytes)
        mail = email.message_from_bytes(content, policy=email.policy.default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        return "250 OK"


@contextmanager
def mail_server(mailbox: Mailbox, port: int = 0) -> Iterator[int]:
    """A real SMTP server on a thread of its own."""
    controller = Controller(mailbox, hostname="127.0.0.1", port=port or free_port())
    controller.start()
    try:
        yield controller.port
    finally:
        mailbox.open.set()
        controller.stop()


class Hook(BaseHTTPRequestHandler):
    """Answers with the server's next status, then 200, once the server is `open`, and keeps what came."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.open.wait()
        status = server.statuses.pop(0) if server.statuses else 200
        server.calls.append((status, self.headers["Idempotency-Key"], body))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def web_server(*statuses: int, listener: socket.socket | None = None) -> Iterator[Any]:
    """A real HTTP server on a thread of its own."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hook, bind_and_activate=listener is None)
    if listener is not None:
        server.socket.close()
        server.socket = listener
        server.server_address = listener.getsockname()
        server.server_activate()
    server.daemon_threads = True
    server.statuses, server.calls, server.open = list(statuses), [], threading.Event()
    server.open.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.open.set()
        server.shutdown()
        server.server_close()
        thread.join()


async def deliver(shop: Shop, event: OrderConfirmed | OrderCancelled, event_id: UUID, times: int = 1) -> None:
    """The same event, as a relay that lost its confirms would publish it."""
    topic = type(event).__event_type__.topic
    message = Outgoing(
        exchange=EVENTS_EXCHANGE, routing_key=f"{topic}.00", body=msgspec.json.encode(event), message_id=str(event_id), type=topic
    )
    assert set(await shop.broker.publish([message] * times)) == {Receipt.CONFIRMED}


async def test_the_console_sender_writes_a_line_for_each_notice(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "services.notification")
    async with shop.running(notification.bus):
        await shop.say(CONFIRMED, CANCELLED)
        await until_handled(notification.bus, 2)

    lines = sorted(record.getMessage() for record in caplog.records if record.name == "services.notification")
    assert len(lines) == 2
    assert f"Your order {CANCELLED.order_id} is cancelled (out-of-stock)." in lines[1]
    assert f"Your order {CONFIRMED.order_id} over 123.45 is confirmed." in lines[0]


async def test_all_lines_of_a_notice_say_which_order_it_is_about(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logs("notification")
    async with shop.running(notification.bus):
        await shop.say(CONFIRMED, CANCELLED)
        await until_handled(notification.bus, 2)

    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    notices = [line for line in told if line["log.logger"] == "services.notification"]
    assert {line["order.id"] for line in notices} == {str(CONFIRMED.order_id), str(CANCELLED.order_id)}
    assert all(line["order.id"] in line["message"] and line["event.id"] in line["message"] for line in notices)
    assert not [line for line in told if "order.id" in line and line not in notices]


@pytest.mark.parametrize("url", ["", "smtp://", "webhook:", "webhook:ftp://x", "pigeon:post"])
async def test_a_url_that_names_no_sender_is_refused_at_start(url: str) -> None:
    with pytest.raises(SettingsError, match="NOTIFY_URL"):
        async with open_sender(url):
            pass


async def test_an_event_that_comes_several_times_is_mailed_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox()
    event_id, other_id = new_id(), new_id()
    with mail_server(mailbox) as port:
        monkeypatch.setenv("NOTIFY_URL", f"smtp://127.0.0.1:{port}?to=desk@shop.example")
        async with shop.running(notification.bus):
            await deliver(shop, CONFIRMED, event_id, times=3)
            await deliver(shop, CANCELLED, other_id)
            await until_stats(notification.bus, lambda stats: stats.handled + stats.duplicates == 4)
            await deliver(shop, CONFIRMED, event_id)
            await until_stats(notification.bus, lambda stats: stats.handled + stats.duplicates == 5)

            assert (notification.bus.stats.handled, notification.bus.stats.duplicates) == (2, 3)

    mails = {str(mail["Message-ID"]): mail for mail in mailbox.mails}
    assert len(mailbox.mails) == 2
    assert set(mails) == {f"<{event_id}@orders.example>", f"<{other_id}@orders.example>"}
    mail = mails[f"<{event_id}@orders.example>"]
    assert (mail["To"], mail["Subject"]) == ("desk@shop.example", "Order confirmed")
    assert "over 123.45 is confirmed" in mail.get_content()


async def test_many_notices_share_one_mail_connection(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox()
    with mail_server(mailbox) as port:
        monkeypatch.setenv("NOTIFY_URL", f"smtp://127.0.0.1:{port}")
        async with shop.running(notification.bus):
            for number in range(120):
                await deliver(shop, msgspec.structs.replace(CONFIRMED, order_id=UUID(int=number)), new_id())
            await until_handled(notification.bus, 120)

    assert len({str(mail["Message-ID"]) for mail in mailbox.mails}) == len(mailbox.mails) == 120
    assert len(mailbox.peers) == 1


@pytest.mark.parametrize("passing", ["451 try later", "421 too busy"])
async def test_a_passing_refusal_of_a_mail_is_tried_again(shop: Shop, monkeypatch: pytest.MonkeyPatch, passing: str) -> None:
    mailbox = Mailbox()
    mailbox.answers = [passing]
    mailbox.recipient_answers = ["450 mailbox busy"]
    with mail_server(mailbox) as port:
        monkeypatch.setenv("NOTIFY_URL", f"smtp://127.0.0.1:{port}")
        async with shop.running(notification.bus):
            await shop.say(CONFIRMED)
            await until_handled(notification.bus, 1)

    assert len(mailbox.mails) == 1


@pytest.mark.parametrize(("data", "recipient"), [("554 spam", None), (None, "550 nobody of that name")])
async def test_a_mail_that_will_never_be_taken_is_parked_at_once(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, data: str | None, recipient: str | None
) -> None:
    mailbox = Mailbox()
    mailbox.answers = [data] if data else []
    mailbox.recipient_answers = [recipient] if recipient else []
    with mail_server(mailbox) as port:
        monkeypatch.setenv("NOTIFY_URL", f"smtp://127.0.0.1:{port}")
        async with shop.running(notification.bus):
            await shop.say(CONFIRMED)
            await until_stats(notification.bus, lambda stats: stats.parked == 1)
            assert notification.bus.stats.failed == 1

            await shop.say(CANCELLED)
            await until_handled(notification.bus, 1)

        [letter] = shop.broker.messages("notification.orders.confirmed.dlq")
    assert letter.properties.headers["ob-error"] == "Refused"
    assert len(mailbox.mails) == 1


async def test_while_the_mail_server_is_away_notices_wait_and_none_is_parked(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox()
    port = free_port()
    monkeypatch.setenv("NOTIFY_URL", f"smtp://127.0.0.1:{port}")
    async with shop.running(notification.bus):
        await shop.say(CONFIRMED)
        await until_stats(notification.bus, lambda stats: stats.waited >= 2)

        with mail_server(mailbox, port):
            await until_handled(notification.bus, 1)
        assert (notification.bus.stats.failed, notification.bus.stats.parked) == (0, 0)

        with mail_server(mailbox, port):
            await shop.say(CANCELLED)
            await until_handled(notification.bus, 2)

    assert [str(mail["Subject"]) for mail in mailbox.mails] == ["Order confirmed", "Order cancelled"]


async def test_a_webhook_is_called_until_it_answers_always_with_the_same_key(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    event_id = new_id()
    with web_server(503, 429) as server:
        monkeypatch.setenv("NOTIFY_URL", f"webhook:http://127.0.0.1:{server.server_address[1]}/hook")
        async with shop.running(notification.bus):
            await deliver(shop, CONFIRMED, event_id, times=2)
            await until_stats(notification.bus, lambda stats: stats.handled + stats.duplicates == 2)

    assert [(status, key) for status, key, _ in server.calls] == [(status, str(event_id)) for status in (503, 429, 200)]
    assert server.calls[-1][2] == {
        "id": str(event_id),
        "customer_id": str(CUSTOMER),
        "subject": "Order confirmed",
        "text": f"Your order {CONFIRMED.order_id} over 123.45 is confirmed.",
    }


async def test_a_webhook_that_refuses_a_notice_is_not_asked_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server(422) as server:
        monkeypatch.setenv("NOTIFY_URL", f"webhook:http://127.0.0.1:{server.server_address[1]}/hook")
        async with shop.running(notification.bus):
            await shop.say(CONFIRMED)
            await until_stats(notification.bus, lambda stats: stats.parked == 1)

    assert len(server.calls) == 1


async def test_while_nobody_listens_at_the_webhook_notices_wait(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    monkeypatch.setenv("NOTIFY_URL", f"webhook:http://127.0.0.1:{listener.getsockname()[1]}/hook")
    async with shop.running(notification.bus):
        await shop.say(CONFIRMED)
        await until_stats(notification.bus, lambda stats: stats.waited >= 2)

        with web_server(listener=listener) as server:

            async def look() -> tuple[bool, object]:
                return bool(server.calls), server.calls

            await until(look)
            await until_handled(notification.bus, 1)
        assert notification.bus.stats.failed == 0


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Of a host that swallows packets: a listener whose queue is full."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.parametrize("url", ["webhook:http://127.0.0.1:{}/hook", "smtp://127.0.0.1:{}"])
async def test_a_host_that_swallows_packets_is_as_one_that_is_away(
    silent_port: int, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    for module in (smtp, webhook):
        monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    async with open_sender(url.format(silent_port)) as sender:
        with pytest.raises(UnavailableError, match=f"^mail server 127.0.0.1:{silent_port}: .|^webhook: can't connect: ."):
            await sender.send(NOTICE)


async def test_waiting_for_a_slow_webhook_counts_as_no_attempt(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "MOST_CONNECTIONS", 1)
    monkeypatch.setattr(webhook, "TURN_S", 0.05)
    with web_server() as server:
        server.open.clear()
        monkeypatch.setenv("NOTIFY_URL", f"webhook:http://127.0.0.1:{server.server_address[1]}/hook")
        async with shop.running(notification.bus):
            await shop.say(CONFIRMED, CANCELLED)
            await until_stats(notification.bus, lambda stats: stats.waited >= 2)
            server.open.set()
            await until_handled(notification.bus, 2)
            assert notification.bus.stats.failed == 0

    assert len({key for _, key, _ in server.calls}) == len(server.calls) == 2


async def test_waiting_for_a_slow_mail_server_counts_as_no_attempt(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "TURN_S", 0.05)
    mailbox = Mailbox()
    mailbox.open.clear()
    with mail_server(mailbox) as port:
        monkeypatch.setenv("NOTIFY_URL", f"smtp://127.0.0.1:{port}")
        async with shop.running(notification.bus):
            await shop.say(CONFIRMED, CANCELLED)
            await until_stats(notification.bus, lambda stats: stats.waited >= 2)
            mailbox.open.set()
            await until_handled(notification.bus, 2)
            assert notification.bus.stats.failed == 0

    assert len({str(mail["Message-ID"]) for mail in mailbox.mails}) == len(mailbox.mails) == 2


async def test_a_mail_that_takes_too_long_is_given_up_and_the_next_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox()
    mailbox.open.clear()
    with mail_server(mailbox) as port:
        async with open_sender(f"smtp://127.0.0.1:{port}") as sender:
            with monkeypatch.context() as patch:
                patch.setattr(smtp, "SEND_S", 0.05)
                with pytest.raises(TimeoutError, match=r"not sent in 0\.05 s"):
                    await sender.send(NOTICE)
            mailbox.open.set()
            await sender.send(msgspec.structs.replace(NOTICE, subject="The next"))

    assert "The next" in [mail["Subject"] for mail in mailbox.mails]


def test_what_was_begun_is_not_cut_off_by_the_limit_of_its_handler() -> None:
    for handler in notification.bus.handlers:
        assert handler.options.timeout_s > smtp.TURN_S + smtp.TIMEOUT_S + smtp.SEND_S
        assert handler.options.timeout_s > webhook.TURN_S + 3 * webhook.TIMEOUT_S  # to connect, to write and to read
