"""Idempotency keys inside the process: for tests, and for programs of one process that need no Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
from anyio.lowlevel import checkpoint

from orderbus.abc import ClaimAnswer, ClaimState
from orderbus.adapters.memory.shared import SharedByName
from orderbus.errors import UnavailableError

__all__ = ["MemoryClaims", "open_claims"]

LIMIT_KEYS = 1_000_000

_GRANTED = ClaimAnswer(ClaimState.GRANTED)
_IN_PROGRESS = ClaimAnswer(ClaimState.IN_PROGRESS)
_MISMATCH = ClaimAnswer(ClaimState.MISMATCH)


@asynccontextmanager
async def open_claims(url: str, *, prefix: str = "") -> AsyncIterator[MemoryClaims]:
    """Open claims: `memory://` has a table of its own, `memory://NAME` shares one in this process (and event loop).

    `prefix` keeps the keys of one user of a shared table apart from those of others.
    """
    with tables.open(url) as claims:
        yield claims.prefixed(prefix)


class MemoryClaims:
    """Implements `orderbus.abc.Claims`; leases and answers run out by `anyio.current_time`.

    At most `limit_keys` live keys in a table: beyond them `claim` raises UnavailableError, for to forget one would be to
    let its work be done twice.
    """

    def __init__(self, table: _Table | None = None, *, prefix: str = "", limit_keys: int = LIMIT_KEYS) -> None:
        self.table = _Table() if table is None else table
        self._prefix = prefix
        self._limit_keys = limit_keys

    def prefixed(self, prefix: str) -> MemoryClaims:
        """The same table for another user of it, whose keys are apart from those of others."""
        return MemoryClaims(self.table, prefix=prefix, limit_keys=self._limit_keys)

    async def claim(self, keys: Sequence[tuple[str, str]], token: str, lease_ms: int) -> Sequence[ClaimAnswer]:
        """Claim (key, fingerprint) pairs; the token that holds a key already renews its lease."""
        await checkpoint()
        now = anyio.current_time()
        self.table.make_room(now, len(keys), self._limit_keys)
        return [self._claim_one(self._prefix + key, fingerprint, token, now, lease_ms / 1000) for key, fingerprint in keys]

    async def complete(self, answers: Sequence[tuple[str, bytes]], token: str, keep_ms: int) -> Sequence[bool]:
        """Store the answer for each key that the token still holds, for `keep_ms`; False where the lease had been lost."""
        await checkpoint()
        now = anyio.current_time()
        stored = []
        for key, answer in answers:
            claim = self._held(key, token, now)
            if claim is not None:
                claim.answer = answer
                claim.until = now + keep_ms / 1000
            stored.append(claim is not None)
        return stored

    async def release(self, keys: Sequence[str], token: str) -> None:
        """Give up the keys that the token still holds, so that another may claim them at once."""
        await checkpoint()
        now = anyio.current_time()
        for key in keys:
            if self._held(key, token, now) is not None:
                del self.table.claims[self._prefix + key]

    def _claim_one(self, key: str, fingerprint: str, token: str, now: float, lease_s: float) -> ClaimAnswer:
        claim = self.table.claims.get(key)
        if claim is None or claim.until <= now:
            self.table.claims[key] = _Claim(fingerprint, token, now + lease_s)
            return _GRANTED
        if claim.fingerprint != fingerprint:
            return _MISMATCH
        if claim.answer is not None:
            return ClaimAnswer(ClaimState.DONE, claim.answer)
        if claim.token != token:
            return _IN_PROGRESS
        claim.until = now + lease_s
        return _GRANTED

    def _held(self, key: str, token: str, now: float) -> _Claim | None:
        claim = self.table.claims.get(self._prefix + key)
        if claim is None or claim.token != token or claim.answer is not None or claim.until <= now:
            return None
        return claim


class _Claim:
    """A key under lease, or (with an answer) done. `until` ends either."""

    __slots__ = ("answer", "fingerprint", "token", "until")

    def __init__(self, fingerprint: str, token: str, until: float) -> None:
        self.fingerprint = fingerprint
        self.token = token
        self.until = until
        self.answer: bytes | None = None


class _Table:
    def __init__(self) -> None:
        self.claims: dict[str, _Claim] = {}
        self._purge_at = 1024

    def make_room(self, now: float, more: int, limit_keys: int) -> None:
        """Drop what has run out whenever the table has doubled, so that a claim costs the same at any size."""
        wanted = len(self.claims) + more
        if wanted <= min(self._purge_at, limit_keys):
            return
        self.claims = {key: claim for key, claim in self.claims.items() if claim.until > now}
        self._purge_at = max(1024, 2 * (len(self.claims) + more))
        if len(self.claims) + more > limit_keys:
            raise UnavailableError(f"the memory claims are full: {len(self.claims)} live keys of at most {limit_keys}")


tables = SharedByName("claims table", MemoryClaims)
