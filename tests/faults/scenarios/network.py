"""What networks do to connections, by a proxy between the processes and their servers."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from urllib.parse import quote, urlsplit

from tests.faults.program import QUEUES
from tests.faults.proxy import Proxy
from tests.faults.scenario import scenario
from tests.faults.world import Broken, Which, World
from tests.security.certificates import Authority

HEARTBEAT_S = 5
RESETS = 12
MOST_BYTES = 200_000
LATENCY_S = 0.2
ROLES = ("service", "trail", "relay")
BOTH: tuple[Which, ...] = ("broker", "database")


def proxied(world: World, which: Which) -> Proxy:
    """Everything, the producer too, through one; heartbeats are short, or half of the time would be spent waiting for them."""
    if which == "broker":
        world.environment["ORDERBUS_BROKER_URL"] += f"?heartbeat={HEARTBEAT_S}"
    return world.proxy(which)


def reset(world: World, which: Which) -> None:
    """RST after a random number of bytes, in the middle of a frame or a row, again and again."""
    proxy = proxied(world, which)
    world.begin(*ROLES)
    for _ in range(RESETS):
        before = proxy.resets
        proxy.reset_within(MOST_BYTES)
        world.until(lambda: proxy.resets > before, "a reset")  # noqa: B023 - it is waited for here
        proxy.pass_on()
        world.pause(0.0, 0.5)
    world.mended()


NOTICED = {
    "broker": {"service": "coming back", "trail": "coming back", "relay": "the outbox waits"},
    "database": dict.fromkeys(ROLES, "no answer within"),
}
"""What each says when it gives its connection up. Who has nothing in hand, and gets nothing, need not notice a database that is away."""


def cut(world: World, which: Which, *, up: bool, down: bool) -> None:
    """Nothing arrives in that direction, and nobody is told, until they have given their connections up, each by a limit of its own."""
    proxy = proxied(world, which)
    world.begin(*ROLES)
    proxy.black_hole(up=up, down=down)
    for name, says in NOTICED[which].items():

        def has_noticed(name: str = name, says: str = says) -> bool:
            is_idle = which == "database" and name in QUEUES and not world.in_hand(*QUEUES[name])
            return says in world.role(name).log() or is_idle

        world.until(has_noticed, f"{name} to give its connection up")
    proxy.pass_on()
    world.mended()


def slow(world: World, which: Which) -> None:
    """400 ms for every question and its answer: what was on its way stays in its order, and the load goes on.

    The producer asks its database five questions for 20 events, so with a slow one there are 10 a second.
    """
    proxy = proxied(world, which)
    world.begin(*ROLES)
    proxy.latency_s = LATENCY_S
    world.flow(2000 if which == "broker" else 200)
    proxy.latency_s = 0.0
    world.mended()


def sliced(world: World, which: Which) -> None:
    """Each byte arrives alone."""
    proxy = proxied(world, which)
    world.begin(*ROLES)
    proxy.is_sliced = True
    world.flow(200)
    proxy.pass_on()
    world.mended()


def silent(world: World, which: Which) -> None:
    """It accepts connections, and never says a word: who runs and who starts waits for it, and goes on when it speaks."""
    proxy = proxied(world, which)
    world.begin(*ROLES)
    proxy.fall_silent()
    newcomer = world.start("service-b", is_awaited=False)
    world.pause(8.0, 12.0)
    proxy.pass_on()
    if which == "database" and not newcomer.runs:
        world.start("service-b")
    world.mended()


def refused(world: World, which: Which) -> None:
    """Nobody listens for a while, again and again."""
    proxy = proxied(world, which)
    world.begin(*ROLES)
    for _ in range(4):
        proxy.refuse()
        world.pause(0.5, 3.0)
        proxy.pass_on()
        world.flow(200)
    world.mended()


for _which in BOTH:
    scenario(f"{_which}-connections-reset-at-random-bytes", quick=_which == "broker")(partial(reset, which=_which))
    scenario(f"{_which}-in-a-black-hole")(partial(cut, which=_which, up=True, down=True))
    scenario(f"{_which}-hears-and-is-not-heard")(partial(cut, which=_which, up=False, down=True))
    scenario(f"{_which}-is-heard-and-does-not-hear")(partial(cut, which=_which, up=True, down=False))
    scenario(f"{_which}-with-200-ms-latency")(partial(slow, which=_which))
    scenario(f"{_which}-in-1-byte-slices")(partial(sliced, which=_which))
    scenario(f"{_which}-accepts-and-is-silent")(partial(silent, which=_which))
    scenario(f"{_which}-refuses-connections")(partial(refused, which=_which))


@scenario("broker-with-a-wrong-certificate")
def wrong_certificate(world: World) -> None:
    """Somebody else answers at its address: nobody tells him a name or a password, and who has a connection goes on."""
    world.begin(*ROLES)
    folder = world.servers.folder
    ours, theirs = Authority(folder / f"ours-{world.vhost}"), Authority(folder / f"theirs-{world.vhost}")
    certificate = theirs.issue("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.file, certificate.key)
    parts = urlsplit(world.broker_url)
    with impostor(context) as (port, heard):
        url = f"amqps://{parts.username}:{parts.password}@localhost:{port}{parts.path}?cafile={quote(str(ours.file))}"
        newcomer = world.start("service-b", is_awaited=False, ORDERBUS_BROKER_URL=url)
        world.until(lambda: "certificate" in newcomer.log(), "the newcomer to refuse the certificate")
        world.flow(1000)
        if heard:
            raise Broken(f"the impostor was told {bytes(heard[:40])!r}")
        if newcomer.runs:
            newcomer.stop()
    world.mended()


@contextmanager
def impostor(context: ssl.SSLContext) -> Iterator[tuple[int, bytearray]]:
    """Its port, and what it was told once a connection was encrypted."""
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with suppress(OSError), context.wrap_socket(connection, server_side=True) as encrypted:
                        heard.extend(encrypted.recv(4096))

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], heard
