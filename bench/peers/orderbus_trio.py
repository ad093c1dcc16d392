"""orderbus on trio; the drivers run on an asyncio thread beside it. The programs are those of bench/peers/orderbus.py."""

from collections.abc import Awaitable
from typing import Any

import anyio

from bench.child import main
from bench.peers.orderbus import trio


def run(work: Awaitable[Any]) -> None:
    async def whole() -> None:
        await work

    anyio.run(whole, backend="trio")


if __name__ == "__main__":
    main({"trio": trio}, run)
