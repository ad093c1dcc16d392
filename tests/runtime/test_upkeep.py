"""The hourly upkeep of a bus: whatever fails in it, the next hour comes."""

from __future__ import annotations

import logging
from typing import cast

import anyio
import pytest

from orderbus._runtime import upkeep
from orderbus.abc import Store
from orderbus.errors import UnavailableError, UsageError

pytestmark = pytest.mark.anyio

NOT_OURS = UsageError("the role does not own orderbus.inbox", code="OB504")


class Failing:
    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.over = anyio.Event()

    async def maintain(self, window_s: float) -> None:
        if self._failures:
            raise self._failures.pop(0)
        self.over.set()


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ([UnavailableError("away"), ValueError("of the database")], ["WARNING away", "WARNING of the database"]),
        ([NOT_OURS, NOT_OURS], [f"INFO {NOT_OURS}"]),
    ],
)
async def test_it_goes_on_whatever_it_fails_with(
    failures: list[Exception], told: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "MAINTENANCE_EVERY_S", 0)
    caplog.set_level(logging.INFO, "orderbus")
    store = Failing(*failures)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(upkeep.maintain, cast("Store", store), 3600)
        with anyio.fail_after(10):
            await store.over.wait()
        tasks.cancel_scope.cancel()

    assert [f"{record.levelname} {record.getMessage().partition(': ')[2]}" for record in caplog.records] == told
