"""Thousands of accidents in a few seconds: `python examples/07_simulate.py` finds a bug that no test of one accident would.

Who dies, what gets lost and what comes late is decided by a seed, in virtual time; servers are not needed.
"""

from orderbus import Bus, Event, Settings, Tx
from orderbus.testing import sim


class OrderPlaced(Event, topic="orders.placed", key="number"):
    number: int


class OrderPaid(Event, topic="orders.paid", key="number"):
    number: int


def shop(world: sim.World, *, charges_in_tx: bool = True) -> None:
    """Two processes: one places orders, another charges for them. It begins anew for each schedule."""
    api, payments = Bus("api"), Bus("payments", settings=Settings(relay=False))
    orders, charged = [1, 2, 3], list[int]()

    @payments.on(OrderPlaced)
    async def charge(order: OrderPlaced, tx: Tx) -> OrderPaid:
        if charges_in_tx:
            await tx.execute("insert into payment (number) values (%s)", (order.number,))
        else:
            charged.append(order.number)  # an effect that no rollback takes back
        return OrderPaid(number=order.number)

    @payments.on(OrderPaid)
    async def ship(order: OrderPaid, tx: Tx) -> None:
        await tx.execute("insert into shipment (number) values (%s)", (order.number,))

    async def place(bus: Bus) -> None:
        while orders:
            async with bus.transaction() as tx:
                tx.emit(OrderPlaced(number=orders.pop()))

    def each_order_is_charged_once() -> None:
        numbers = charged + [number for [number] in world.rows("insert into payment")]
        assert len(numbers) == len(set(numbers)), f"charged are {sorted(numbers)}"

    world.process(api, place)
    world.process(payments)
    world.invariant(each_order_is_charged_once)


def careless_shop(world: sim.World) -> None:
    shop(world, charges_in_tx=False)


if __name__ == "__main__":
    print(f"shop: {sim.explore(shop, schedules=300)}")
    try:
        sim.explore(careless_shop, schedules=300)
    except sim.ViolationError as found:
        print(f"careless_shop: {found}")
        again = sim.replay(careless_shop, found.shortest.schedule)
        print(f"replayed: {again.broken[0]}")
