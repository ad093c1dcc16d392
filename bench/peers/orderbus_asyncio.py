"""orderbus on the event loop that comes with Python. The programs are those of bench/peers/orderbus.py."""

from collections.abc import Awaitable
from typing import Any

import anyio

from bench.child import main
from bench.peers.orderbus import trio


def run(work: Awaitable[Any]) -> None:
    async def whole() -> None:
        await work

    anyio.run(whole, backend="asyncio")


if __name__ == "__main__":
    main({"trio": trio}, run)
