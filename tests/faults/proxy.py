"""A TCP proxy that does to bytes what networks do. It runs in a thread of its own; every method may be called from any thread."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from contextlib import suppress

CHUNK = 1 << 16
SLICED_PER_TURN = 256
"""So many one-byte writes, then the other connections have their turn."""


class Proxy:
    """Listens on `port` of the loopback and passes on to `target_port`, which may be changed: connections from then on go there."""

    def __init__(self, target_port: int, rng: random.Random) -> None:
        self.target_port = target_port
        self.latency_s = 0.0
        """Added to each direction of every chunk; chunks keep their order, and do not wait for each other."""
        self.is_sliced = False
        """Every byte is written on its own."""
        self._rng = rng
        self._links: set[_Link] = set()
        self._gates = {"up": True, "down": True}
        self._refuses = self._is_silent = False
        self._budget: int | None = None
        self.resets = 0
        self._loop = asyncio.new_event_loop()
        self._changed: asyncio.Event
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="proxy", daemon=True)
        self._thread.start()
        started.wait()

    # What can be done to it

    def reset_all(self) -> None:
        """RST to both sides of every connection."""
        self._do(lambda: [link.reset() for link in list(self._links)])

    def reset_within(self, most_bytes: int) -> None:
        """From now on, connections are reset after a random number of bytes; `None` of them again after `pass_on`."""
        self._do(lambda: setattr(self, "_budget", most_bytes))
        self._do(lambda: [link.limit(self._rng.randrange(most_bytes)) for link in self._links])

    def black_hole(self, *, up: bool = True, down: bool = True) -> None:
        """Nothing passes in that direction any more, and nobody is told: `up` is towards the server."""
        self._do(lambda: self._gate(up=not up, down=not down))

    def refuse(self) -> None:
        """End all connections, and every new one at once."""
        self._do(lambda: setattr(self, "_refuses", True))
        self.reset_all()

    def fall_silent(self) -> None:
        """New connections are accepted and nobody ever says a word; those there are now are ended."""
        self._do(lambda: setattr(self, "_is_silent", True))
        self.reset_all()

    def pass_on(self) -> None:
        """All is well again. Connections that were accepted while it was silent, or cut in a black hole, are reset."""

        def mend() -> None:
            was_odd = self._is_silent or not all(self._gates.values())
            self._refuses = self._is_silent = self.is_sliced = False
            self._budget, self.latency_s = None, 0.0
            for link in list(self._links):
                link.limit(None)
                if was_odd:
                    link.reset()
            self._gate(up=True, down=True)

        self._do(mend)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    # In its thread

    def _do(self, what: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            what()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait(10)

    def _gate(self, *, up: bool, down: bool) -> None:
        self._gates = {"up": up, "down": down}
        self._changed.set()
        self._changed = asyncio.Event()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def listen() -> asyncio.Server:
            self._changed = asyncio.Event()
            return await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK)

        server = self._loop.run_until_complete(listen())
        self.port: int = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        for link in list(self._links):
            link.reset()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links.add(link)
        try:
            if self._refuses:
                return
            if self._is_silent:
                await link.is_over.wait()
                return
            try:
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target_port, limit=CHUNK)
            except OSError:
                return
            link.writers.append(up_writer)
            if self._budget is not None:
                link.limit(self._rng.randrange(self._budget))
            ways = [
                asyncio.create_task(self._pump(link, reader, up_writer, "up")),
                asyncio.create_task(self._pump(link, up_reader, writer, "down")),
            ]
            await asyncio.wait(ways)
        except asyncio.CancelledError:
            pass  # at the proxy's end; Python 3.11 would print it
        finally:
            link.reset()
            self._links.discard(link)

    async def _pump(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        due = asyncio.Queue[tuple[float, bytes]](64)
        forward = asyncio.create_task(self._forward(link, due, writer, way))
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                await due.put((self._loop.time() + self.latency_s, chunk))
        await due.put((0.0, b""))
        await forward

    async def _forward(
        self, link: _Link, due: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: str
    ) -> None:
        while True:
            at, chunk = await due.get()
            if not chunk or link.is_over.is_set():
                with suppress(OSError):
                    writer.write_eof()
                while chunk:
                    _, chunk = await due.get()
                return
            if (early_s := at - self._loop.time()) > 0:
                await asyncio.sleep(early_s)
            while not self._gates[way]:
                await self._changed.wait()
            passed = link.takes(len(chunk))
            with suppress(OSError):
                if self.is_sliced:
                    for n in range(passed):
                        writer.write(chunk[n : n + 1])
                        if n % SLICED_PER_TURN == 0:
                            await writer.drain()
                            await asyncio.sleep(0)
                else:
                    writer.write(chunk[:passed])
                await writer.drain()
            if passed < len(chunk):
                self.resets += 1
                link.reset()


class _Link:
    """A connection through the proxy: both its sides, and how many bytes it may still take."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.is_over = asyncio.Event()
        self._left: int | None = None

    def limit(self, left: int | None) -> None:
        self._left = left

    def takes(self, count: int) -> int:
        if self._left is None:
            return count
        taken = min(count, self._left)
        self._left -= taken
        return taken

    def reset(self) -> None:
        self.is_over.set()
        for writer in self.writers:
            writer.transport.abort()
