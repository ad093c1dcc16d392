"""Wall clocks that are wrong, differ from each other, or jump. No promise may rest on them."""

from __future__ import annotations

from functools import partial

from tests.faults.scenario import scenario
from tests.faults.world import World

OFF_S = 600
JUMP_AFTER_S = 3
ROLES = ("service", "trail", "relay")


def wrong_clock(world: World, role: str, clock: str) -> None:
    """The load's own clock is right unless it is the producer's that is wrong."""
    for name in ROLES:
        world.start(name, **({"FAULTS_CLOCK": clock} if name == role else {}))
    world.start("producer", **({"FAULTS_CLOCK": clock} if role == "producer" else {}))
    world.flow()
    world.mended()


for _role in (*ROLES, "producer"):
    for _word, _clock in (("ahead", f"{OFF_S}"), ("behind", f"-{OFF_S}")):
        scenario(f"{_role}-clock-10-minutes-{_word}")(partial(wrong_clock, role=_role, clock=_clock))


def jumps(world: World, offset_s: int) -> None:
    """The clocks of all processes, a few seconds after their start."""
    for name in (*ROLES, "producer"):
        world.start(name, FAULTS_CLOCK=f"{JUMP_AFTER_S}:{offset_s}")
    world.flow()
    world.pause(JUMP_AFTER_S, JUMP_AFTER_S + 1)
    world.flow()
    world.mended()


scenario("all-clocks-jump-back-10-minutes")(partial(jumps, offset_s=-OFF_S))
scenario("all-clocks-jump-ahead-10-minutes")(partial(jumps, offset_s=OFF_S))


@scenario("two-services-whose-clocks-differ-by-20-minutes")
def differ(world: World) -> None:
    """What one of them puts off by a second, the other one may get back."""
    world.start("service", FAULTS_CLOCK=f"{OFF_S}")
    world.start("service-b", FAULTS_CLOCK=f"-{OFF_S}")
    world.begin("trail", "relay")
    world.mended()
