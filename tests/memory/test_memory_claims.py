"""What the memory claims do beyond the contract: leases in virtual time, and a bound that forgets nothing live."""

from __future__ import annotations

import anyio
import pytest

from orderbus.abc import ClaimState
from orderbus.adapters.memory import MemoryClaims
from orderbus.errors import UnavailableError

pytestmark = pytest.mark.anyio


async def _state(claims: MemoryClaims, key: str, token: str, lease_ms: int = 30_000) -> ClaimState:
    (answer,) = await claims.claim([(key, "f")], token, lease_ms)
    return answer.state


async def test_a_lease_lasts_exactly_as_long_as_was_asked_and_claiming_again_renews_it() -> None:
    claims = MemoryClaims()
    await _state(claims, "k", "a")

    await anyio.sleep(29)
    assert await _state(claims, "k", "b") is ClaimState.IN_PROGRESS
    assert await _state(claims, "k", "a") is ClaimState.GRANTED
    await anyio.sleep(29)
    assert await _state(claims, "k", "b") is ClaimState.IN_PROGRESS
    await anyio.sleep(1)

    assert await _state(claims, "k", "b") is ClaimState.GRANTED


async def test_an_answer_outlives_the_lease() -> None:
    claims = MemoryClaims()
    await _state(claims, "k", "a")
    await claims.complete([("k", b"x")], "a", 3_600_000)

    await anyio.sleep(3599)

    assert await _state(claims, "k", "b") is ClaimState.DONE


async def test_a_full_table_refuses_new_keys_until_old_ones_run_out() -> None:
    claims = MemoryClaims(limit_keys=10)
    await claims.claim([(str(i), "f") for i in range(10)], "a", 30_000)

    with pytest.raises(UnavailableError, match="full"):
        await _state(claims, "more", "a")
    await anyio.sleep(31)

    assert await _state(claims, "more", "a") is ClaimState.GRANTED


async def test_keys_that_ran_out_take_no_room_for_ever() -> None:
    claims = MemoryClaims()

    for i in range(100):
        await claims.claim([(f"{i}-{j}", "f") for j in range(100)], "a", 10)
        await anyio.sleep(1)

    assert len(claims.table.claims) <= 2048
