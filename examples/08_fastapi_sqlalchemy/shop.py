"""A shop on FastAPI and SQLAlchemy: an order and its event commit together, and a handler pays it with a session of its own.

pip install 'orderbus[postgres,cli,fastapi,sqlalchemy]' granian
export ORDERBUS_DATABASE_URL=postgresql://localhost/shop ORDERBUS_BROKER_URL=memory://
orderbus schema apply && python database.py && granian --interface asgi shop:app
curl -H 'Content-Type: application/json' -d '{"number": 7, "cents": 500}' http://127.0.0.1:8000/orders
"""

from collections.abc import AsyncIterator
from typing import Annotated

from database import Order, engine
from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, PositiveInt
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from orderbus import Bus, Event, Tx
from orderbus.ext.fastapi import add_problem_details, lifespan
from orderbus.ext.sqlalchemy import Sessions, enlist


class NewOrder(BaseModel):
    number: PositiveInt
    cents: PositiveInt


class OrderPlaced(Event, topic="orders.placed", key="number"):
    number: int


bus = Bus("shop")
app = FastAPI(lifespan=lifespan(bus))
add_problem_details(app)
new_session = async_sessionmaker(engine)
sessions = Sessions()


async def session_of_request() -> AsyncIterator[AsyncSession]:
    async with new_session() as session:
        yield session


@app.post("/orders", status_code=201)
async def place(new: NewOrder, session: Annotated[AsyncSession, Depends(session_of_request)]) -> NewOrder:
    session.add(Order(number=new.number, cents=new.cents))
    try:
        async with enlist(bus, session) as tx:  # leaving it flushes the order, then inserts the event
            tx.emit(OrderPlaced(number=new.number))
        await session.commit()
    except IntegrityError:
        raise HTTPException(409, f"there is an order {new.number} already") from None
    return new


@app.get("/orders/{number}")
async def look(number: int, session: Annotated[AsyncSession, Depends(session_of_request)]) -> dict[str, bool]:
    order = await session.get(Order, number)
    if order is None:
        raise HTTPException(404, f"there is no order {number}")
    return {"is_paid": order.is_paid}


@bus.on(OrderPlaced)
async def pay(placed: OrderPlaced, tx: Tx) -> None:
    async with sessions(tx) as session:
        order = await session.get_one(Order, placed.number)
        order.is_paid = True  # commits together with the handler's inbox row
