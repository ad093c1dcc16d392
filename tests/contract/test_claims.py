"""Claims contract: one holder at a time, an answer kept for the next, and no trust in a lease that was lost."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from orderbus.abc import Claims, ClaimState
from tests.contract.talk import LIMIT_S

pytestmark = pytest.mark.anyio

LONG_MS = 60_000


@pytest.fixture(
    params=[
        pytest.param(("memory", "asyncio"), id="memory-asyncio"),
        pytest.param(("memory", "trio"), id="memory-trio"),
        pytest.param(("redis", "asyncio"), id="redis", marks=pytest.mark.servers),
    ]
)
def claims_flavour(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def claims(claims_flavour: tuple[str, Any], request: pytest.FixtureRequest) -> AsyncIterator[Claims]:
    prefix = f"contract-{secrets.token_hex(6)}:"
    if claims_flavour[0] == "memory":
        from orderbus.adapters.memory import open_claims

        async with open_claims("memory://", prefix=prefix) as claims:
            yield claims
    else:
        from orderbus.adapters import redis

        async with redis.open_claims(request.getfixturevalue("redis_url"), prefix=prefix) as claims:
            yield claims


async def _state(claims: Claims, key: str, token: str, fingerprint: str = "f", lease_ms: int = LONG_MS) -> ClaimState:
    (answer,) = await claims.claim([(key, fingerprint)], token, lease_ms)
    return answer.state


async def _until_granted(claims: Claims, key: str, token: str) -> None:
    with anyio.fail_after(LIMIT_S):
        while await _state(claims, key, token) is not ClaimState.GRANTED:
            pass


async def test_one_token_holds_a_key_and_others_are_told(claims: Claims) -> None:
    assert await _state(claims, "k", "a") is ClaimState.GRANTED
    assert await _state(claims, "k", "b") is ClaimState.IN_PROGRESS
    assert await _state(claims, "other", "b") is ClaimState.GRANTED


async def test_the_holder_may_claim_again(claims: Claims) -> None:
    """Its first answer may have been lost on the way."""
    await _state(claims, "k", "a")

    assert await _state(claims, "k", "a") is ClaimState.GRANTED


async def test_a_completed_key_gives_its_answer_to_everybody(claims: Claims) -> None:
    await _state(claims, "k", "a")

    assert list(await claims.complete([("k", b"\x00answer\xff")], "a", LONG_MS)) == [True]

    for token in ("a", "b"):
        (got,) = await claims.claim([("k", "f")], token, LONG_MS)
        assert (got.state, got.answer) == (ClaimState.DONE, b"\x00answer\xff")


async def test_an_empty_answer_is_an_answer(claims: Claims) -> None:
    await _state(claims, "k", "a")
    await claims.complete([("k", b"")], "a", LONG_MS)

    assert await _state(claims, "k", "b") is ClaimState.DONE


async def test_another_fingerprint_is_a_mismatch_before_and_after_completion(claims: Claims) -> None:
    await _state(claims, "k", "a")

    assert await _state(claims, "k", "b", fingerprint="g") is ClaimState.MISMATCH
    await claims.complete([("k", b"x")], "a", LONG_MS)
    assert await _state(claims, "k", "b", fingerprint="g") is ClaimState.MISMATCH


async def test_a_lease_that_ended_lets_another_in_and_the_late_holder_out(claims: Claims) -> None:
    await _state(claims, "k", "late", lease_ms=1)
    await _until_granted(claims, "k", "next")

    completed = await claims.complete([("k", b"stale")], "late", LONG_MS)
    await claims.release(["k"], "late")

    assert list(completed) == [False]
    assert await _state(claims, "k", "third") is ClaimState.IN_PROGRESS
    assert list(await claims.complete([("k", b"good")], "next", LONG_MS)) == [True]


async def test_an_answer_is_kept_only_as_long_as_was_asked(claims: Claims) -> None:
    await _state(claims, "k", "a")
    await claims.complete([("k", b"x")], "a", 1)

    await _until_granted(claims, "k", "b")


async def test_what_was_completed_once_is_not_completed_or_released_again(claims: Claims) -> None:
    await _state(claims, "k", "a")
    await claims.complete([("k", b"first")], "a", LONG_MS)

    again = await claims.complete([("k", b"second")], "a", LONG_MS)
    await claims.release(["k"], "a")

    assert list(again) == [False]
    (got,) = await claims.claim([("k", "f")], "b", LONG_MS)
    assert (got.state, got.answer) == (ClaimState.DONE, b"first")


async def test_a_released_key_is_free_at_once(claims: Claims) -> None:
    await _state(claims, "k", "a")

    await claims.release(["k"], "b")
    assert await _state(claims, "k", "b") is ClaimState.IN_PROGRESS

    await claims.release(["k", "never claimed"], "a")
    assert await _state(claims, "k", "b", fingerprint="another") is ClaimState.GRANTED


async def test_many_keys_are_answered_in_their_order(claims: Claims) -> None:
    await claims.claim([("held", "f"), ("done", "f")], "a", LONG_MS)
    await claims.complete([("done", b"x")], "a", LONG_MS)

    answers = await claims.claim([("held", "f"), ("new", "f"), ("done", "f"), ("held", "g")], "b", LONG_MS)
    completed = await claims.complete([("held", b""), ("new", b""), ("missing", b"")], "b", LONG_MS)

    states = [answer.state for answer in answers]
    assert states == [ClaimState.IN_PROGRESS, ClaimState.GRANTED, ClaimState.DONE, ClaimState.MISMATCH]
    assert list(completed) == [False, True, False]


async def test_nothing_is_asked_for_nothing(claims: Claims) -> None:
    assert list(await claims.claim([], "a", LONG_MS)) == []
    assert list(await claims.complete([], "a", LONG_MS)) == []
    await claims.release([], "a")


async def test_of_many_that_claim_at_once_one_is_granted(claims: Claims) -> None:
    states: list[ClaimState] = []

    async def claim(token: str) -> None:
        states.append(await _state(claims, "k", token))

    async with anyio.create_task_group() as tasks:
        for i in range(20):
            tasks.start_soon(claim, f"t{i}")

    assert sorted(state.value for state in states) == ["granted"] + ["in-progress"] * 19
