"""Calls that arrive together go out together: a round trip costs the same for one key and for a hundred."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from orderbus import UnavailableError

MOST_TOGETHER = 256

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class Together(Generic[Asked, Answered]):
    """Turns a function of many into one of one. Nobody waits for company: what has gathered behind a call goes into the next."""

    def __init__(self, call: Callable[[Sequence[Asked]], Awaitable[Sequence[Answered]]]) -> None:
        self._call = call
        self._waiting: deque[tuple[Asked, asyncio.Future[Answered]]] = deque()
        self._wake = asyncio.Event()
        self._ended = False

    async def __call__(self, item: Asked) -> Answered:
        """The answer for one. As many wait as there are requests, which the server bounds. UnavailableError after the end."""
        if self._ended:
            raise UnavailableError("the API is stopping")
        future: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Serve until cancelled; who still waits then gets UnavailableError."""
        batch: list[tuple[Asked, asyncio.Future[Answered]]] = []
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_TOGETHER))]
                    await self._serve(batch)
        finally:
            self._ended = True
            for _, future in (*batch, *self._waiting):
                if not future.done():
                    future.set_exception(UnavailableError("the API is stopping"))

    async def _serve(self, batch: Sequence[tuple[Asked, asyncio.Future[Answered]]]) -> None:
        try:
            answers = await self._call([item for item, _ in batch])
        except Exception as error:  # the callers get it
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
