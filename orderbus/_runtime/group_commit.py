"""Group commit: writes that arrive together commit together.

A commit costs 300 µs and a round trip whether it carries one row or a hundred. Callers hand over their work; whoever
waits while a commit is under way goes into the next one. An idle bus commits at once: nobody waits for company.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import anyio

from orderbus._runtime.calling import no_stray_cancellation
from orderbus._runtime.tracing import Tracing, current_span, current_trace
from orderbus._runtime.tx import Encoding, Tx
from orderbus.abc import Store
from orderbus.errors import TransientError, UnavailableError

T = TypeVar("T")

MOST_TOGETHER = 256
MOST_WAITING = 10_000
ENOUGH_TOGETHER = 32
PACE_S = 0.002
"""A busy lane waits this long for company; an idle one commits at once."""
TRANSIENT_TRIES = 3
LANES = 2
"""Two commits under way: while one is being flushed to disk, the next is prepared."""


class _Ticket(Generic[T]):
    __slots__ = ("abandoned", "cause", "done", "error", "result", "span", "work")

    def __init__(self, work: Callable[[Tx], Awaitable[T] | T]) -> None:
        self.work = work
        self.cause = current_trace()
        self.span = current_span()
        self.done = anyio.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self.abandoned = False


class GroupCommit:
    """Runs `work(tx)` for many callers in few transactions."""

    def __init__(self, store: Store, encoding: Encoding, tracing: Tracing, on_commit: Callable[[int], None]) -> None:
        self._store = store
        self._encoding = encoding
        self._tracing = tracing
        self._on_commit = on_commit
        self._waiting: deque[_Ticket[Any]] = deque()
        self._idle: deque[anyio.Event] = deque()
        self._closed = False

    async def submit(self, work: Callable[[Tx], Awaitable[T] | T]) -> T:
        """Run the work in a shared transaction; its result once that is committed.

        When anything in the shared transaction fails, it is rolled back and every work is run again in one of its own, so
        only the failing caller sees its error; what the database asks to run again is run again. Work must therefore touch
        nothing but its `tx`. Raises UnavailableError when 10,000 callers wait already. Cancelled before its turn, it is not
        run; later, its outcome is unknown.
        """
        if self._closed or len(self._waiting) >= MOST_WAITING:
            raise UnavailableError(
                "the bus is draining" if self._closed else f"{MOST_WAITING} writes wait for the database already"
            )
        ticket = _Ticket(work)
        self._waiting.append(ticket)
        if self._idle:
            self._idle.popleft().set()
        try:
            await ticket.done.wait()
        except BaseException:
            ticket.abandoned = True
            raise
        if ticket.error is not None:
            raise ticket.error
        return cast(T, ticket.result)

    async def run(self) -> None:
        """Serve callers until closed and empty. Cancelled, it lets nobody wait on: who has not been served learns that."""
        try:
            async with anyio.create_task_group() as lanes:
                for _ in range(LANES):
                    lanes.start_soon(self._lane)
        finally:
            self._closed = True
            self._finish(list(self._waiting), UnavailableError("the bus was stopped before the write was begun"))
            self._waiting.clear()

    def close(self) -> None:
        """Take no new work; what waits is still done."""
        self._closed = True
        while self._idle:
            self._idle.popleft().set()

    async def _lane(self) -> None:
        next_at = 0.0
        while True:
            if 0 < len(self._waiting) < ENOUGH_TOGETHER and (early_s := next_at - anyio.current_time()) > 0:
                await anyio.sleep(early_s)
            together = self._take()
            if together:
                try:
                    await self._serve(together)
                finally:
                    left = [ticket for ticket in together if not ticket.done.is_set()]
                    self._finish(left, UnavailableError("the bus was stopped while the write was under way; it may be done"))
                next_at = anyio.current_time() + PACE_S
            elif self._closed:
                return
            else:
                event = anyio.Event()
                self._idle.append(event)
                await event.wait()

    def _take(self) -> list[_Ticket[Any]]:
        together: list[_Ticket[Any]] = []
        while self._waiting and len(together) < MOST_TOGETHER:
            ticket = self._waiting.popleft()
            if not ticket.abandoned:
                together.append(ticket)
        return together

    async def _serve(self, together: Sequence[_Ticket[Any]], tries: int = 1) -> None:
        try:
            await self._commit(together)
        except Exception as error:  # the callers get it, each its own
            if not _is_away(error) and len(together) > 1:
                await self._serve_each(together)
            elif isinstance(error, TransientError) and tries < TRANSIENT_TRIES:
                await self._serve(together, tries + 1)
            else:
                self._finish(together, error)
        else:
            self._finish(together, None)

    async def _serve_each(self, together: Sequence[_Ticket[Any]]) -> None:
        """In a transaction of its own. Once the database is away, who comes after that learns it at once, not a time limit each."""
        for n, ticket in enumerate(together):
            await self._serve([ticket])
            if _is_away(ticket.error):
                self._finish(together[n + 1 :], ticket.error)
                return

    async def _commit(self, together: Sequence[_Ticket[Any]]) -> None:
        spans = [ticket.span for ticket in together if ticket.span is not None]
        with self._tracing.database("BEGIN", spans):
            tx = Tx(await self._store.begin(), self._encoding, self._tracing)
        try:
            for ticket in together:
                tx._cause = ticket.cause
                with no_stray_cancellation("group_commit"):
                    result = ticket.work(tx)
                    ticket.result = await result if isinstance(result, Awaitable) else result
            with self._tracing.database("COMMIT", spans):
                await tx._commit()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await tx._rollback()
            raise
        self._on_commit(len(tx._emitted))

    def _finish(self, together: Sequence[_Ticket[Any]], error: BaseException | None) -> None:
        for ticket in together:
            ticket.error = error
            ticket.done.set()


def _is_away(error: BaseException | None) -> bool:
    """Whether it says that the database can't be reached."""
    return isinstance(error, UnavailableError) and not isinstance(error, TransientError)
