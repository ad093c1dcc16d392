"""Messages on their way out of a session, to the retry ladder or the dead letters: published, confirmed, then acknowledged."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import anyio

from orderbus._core.delivery import Step
from orderbus._core.message import Outgoing, Receipt
from orderbus._core.policy import backoff_s
from orderbus._core.work import Work
from orderbus._runtime.accounts import Accounts
from orderbus._runtime.environment import Environment
from orderbus.errors import UnavailableError

log = logging.getLogger("orderbus.consumer")

PUBLISH_TRIES = 10


class Leaving:
    """What can't be published stays here and is tried again, up to `PUBLISH_TRIES` times.

    It runs beside the workers: while an alarm keeps all publishes back, consuming goes on, for that may be what ends it.
    """

    def __init__(
        self,
        queue: str,
        env: Environment,
        accounts: Accounts,
        *,
        settle: Callable[[Work, Step], None],
        give_back: Callable[[Work], None],
    ) -> None:
        self._queue = queue
        self._env = env
        self._accounts = accounts
        self._settle = settle
        self._give_back = give_back
        self._ready: list[tuple[Work, Outgoing]] = []
        self._refused: list[tuple[float, Work, Outgoing]] = []
        self._changed = anyio.Event()
        self._is_complete = False
        self._is_lost = False
        self.count = 0
        """Those that have not left yet."""

    def add(self, leaving: Sequence[tuple[Work, Outgoing]]) -> None:
        for work, _ in leaving:
            work.take(Step.LEAVE)
        self.count += len(leaving)
        self._ready += leaving
        self._changed.set()

    def complete(self) -> None:
        """Nothing more will be added; `run` ends when all have left."""
        self._is_complete = True
        self._changed.set()

    def lose(self) -> None:
        """The subscription is gone, and with it the deliveries: publish no more."""
        self._is_lost = True

    async def run(self) -> None:
        try:
            while not self._is_lost and not (self._is_complete and not self._ready and not self._refused):
                now = anyio.current_time()
                batch = self._ready + [(work, outgoing) for due, work, outgoing in self._refused if due <= now]
                if batch:
                    self._ready = []
                    self._refused = [one for one in self._refused if one[0] > now]
                    await self._publish(batch)
                    continue
                self._changed = anyio.Event()
                with anyio.move_on_after(min((due for due, _, _ in self._refused), default=math.inf) - now):
                    await self._changed.wait()
        finally:
            for work in (*(work for work, _ in self._ready), *(work for _, work, _ in self._refused)):
                self.count -= 1
                self._give_back(work)

    async def _publish(self, batch: Sequence[tuple[Work, Outgoing]]) -> None:
        try:
            with self._env.tracing.leaving(batch) as told:
                receipts = await self._env.broker.publish([outgoing for _, outgoing in batch])
                told += receipts
        except UnavailableError as error:
            log.warning("queue %s: retries and dead letters can't be published: %s", self._queue, error)
            receipts = [Receipt.UNKNOWN] * len(batch)
        except BaseException:
            self._ready = [*batch, *self._ready]
            raise
        for (work, outgoing), receipt in zip(batch, receipts, strict=True):
            if receipt is Receipt.CONFIRMED:
                self.count -= 1
                self._settle(work, Step.FINISH)
                if work.parks_for:
                    self._accounts.parked(work)
            else:
                self._refuse(work, outgoing)
        if not self._is_lost and any(receipt in (Receipt.UNROUTABLE, Receipt.UNKNOWN) for receipt in receipts):
            await self._reapply()

    def _refuse(self, work: Work, outgoing: Outgoing) -> None:
        work.refusals += 1
        if work.refusals < PUBLISH_TRIES:
            due = anyio.current_time() + backoff_s(work.refusals, jitter=self._env.rng.random())
            self._refused.append((due, work, outgoing))
            return
        self._accounts.immovable(work, outgoing)
        self.count -= 1
        self._settle(work, Step.REJECT)

    async def _reapply(self) -> None:
        """Somebody deleted the queue that it should go to: declare it again."""
        try:
            await self._env.broker.apply(self._env.topology)
        except UnavailableError as error:
            log.warning("queue %s: the topology can't be applied: %s", self._queue, error)
