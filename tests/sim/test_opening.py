"""Found by the simulator: a process that is told to end while its bus opens."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from orderbus import Bus, Settings
from orderbus.testing.sim import World, replay


@pytest.mark.parametrize("steps", range(15))
def test_a_bus_that_is_cancelled_while_it_opens_ends(steps: int) -> None:
    def cancelling(world: World) -> None:
        async def open_another() -> None:
            async with Bus("other", settings=Settings(broker_url="memory://")):
                await anyio.sleep_forever()

        async def script(bus: Bus) -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(open_another)
                for _ in range(steps):
                    await checkpoint()
                tasks.cancel_scope.cancel()

        world.process(Bus("api"), script)
        world.limit_s = 60.0

    assert not replay(cancelling, "0 -").broken
