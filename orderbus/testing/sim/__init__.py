"""The simulator: a whole graph of services in virtual time, where a seed decides who dies, what gets lost, and what comes late.

    def shop(world: sim.World) -> None:
        world.process(bus, place_orders)
        world.invariant(each_order_is_paid_once)

    sim.explore(shop, 1_000)

Producers, relays and consumers run as they are, on the memory broker, store and claims. See docs/simulator.md.
"""

from orderbus.testing.sim.decisions import Decision, Fault
from orderbus.testing.sim.exploring import Explored, Run, Scenario, ViolationError, explore, replay
from orderbus.testing.sim.ledger import Statement
from orderbus.testing.sim.world import World

__all__ = ["Decision", "Explored", "Fault", "Run", "Scenario", "Statement", "ViolationError", "World", "explore", "replay"]
