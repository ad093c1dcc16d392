"""A FastAPI app with a bus: its life, a request's transaction on a real PostgreSQL, and what a client is told of failures."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import psycopg
import pytest
from fastapi import Depends, FastAPI, HTTPException

from orderbus import Bus, Event, MessageError, Settings, Tx, UsageError
from orderbus.ext.fastapi import add_problem_details, lifespan, transaction

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

Database = psycopg.Connection[Any]


class Paid(Event, topic="orders.paid", key="number", unrouted="drop"):
    number: int


def shop(bus: Bus) -> FastAPI:
    app = FastAPI(lifespan=lifespan(bus))
    add_problem_details(app)

    @app.post("/payments/{number}", status_code=201)
    async def pay(number: int, cents: int, tx: Annotated[Tx, transaction(bus)]) -> dict[str, int]:
        tx.defer("insert into payment (number, cents) values (%s, %s)", (number, cents))
        tx.emit(Paid(number=number))
        if cents == 0:
            raise HTTPException(409, "nothing to pay")
        return {"number": number}

    async def checked(tx: Annotated[Tx, transaction(bus)]) -> Tx:
        return tx

    @app.get("/same")
    async def compare(one: Annotated[Tx, Depends(checked)], other: Annotated[Tx, transaction(bus)]) -> bool:
        return one is other

    @app.post("/letters")
    async def read() -> None:
        raise MessageError("undecodable", "the letter is in no known alphabet")

    @app.post("/outage")
    async def lose_the_server(tx: Annotated[Tx, transaction(bus)]) -> None:
        await tx.execute("select pg_terminate_backend(pg_backend_pid())")

    return app


@pytest.fixture
def bus(module_url: str, db: Database) -> Bus:
    """Without a relay, so that what was emitted stays to be seen."""
    return Bus("shop", settings=Settings(broker_url="memory://", database_url=module_url, relay=False, pool_size=1))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The app between its start and its stop, without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        yield client


@pytest.fixture
async def client(anyio_backend: Any, bus: Bus) -> AsyncIterator[httpx.AsyncClient]:
    async with running(shop(bus)) as client:
        yield client


def written(db: Database) -> tuple[list[int], list[str]]:
    return (
        [number for (number,) in db.execute("select number from payment").fetchall()],
        [key for (key,) in db.execute("select key from orderbus.outbox").fetchall()],
    )


async def test_the_bus_is_open_while_the_app_is_and_drained_after(bus: Bus) -> None:
    async with running(shop(bus)):
        assert not bus.draining
        assert bus.receipt is None

    assert bus.draining
    assert bus.receipt is not None


async def test_a_bus_that_can_not_be_opened_ends_the_start_and_closes_those_before_it(bus: Bus) -> None:
    without_settings = Bus("stray", settings=Settings(broker_url="ftp://"))

    with pytest.raises(UsageError, match="must begin with one of amqp://"):
        await running(FastAPI(lifespan=lifespan(bus, without_settings))).__aenter__()

    assert bus.receipt is not None


async def test_row_and_event_are_committed_when_the_client_has_its_answer(client: httpx.AsyncClient, db: Database) -> None:
    answer = await client.post("/payments/1?cents=500")

    assert (answer.status_code, answer.json()) == (201, {"number": 1})
    assert written(db) == ([1], ["1"])


async def test_an_exception_out_of_the_operation_rolls_back(client: httpx.AsyncClient, db: Database) -> None:
    answer = await client.post("/payments/1?cents=0")

    assert (answer.status_code, answer.json()) == (409, {"detail": "nothing to pay"})
    assert written(db) == ([], [])


async def test_a_request_has_one_transaction_whoever_asks_for_it(client: httpx.AsyncClient) -> None:
    assert (await client.get("/same")).json() is True


async def test_nobody_is_told_of_success_when_the_commit_fails(client: httpx.AsyncClient, db: Database) -> None:
    answer = await client.post("/payments/1?cents=-1")

    assert answer.status_code == 500
    assert written(db) == ([], [])


async def test_a_server_that_is_away_is_a_503_that_says_when_to_come_back_and_no_address(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await client.post("/outage")

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "a server that this service needs is away; try again later",
    }
    assert "POST /outage: PostgreSQL at " in caplog.text
    assert (await client.post("/payments/1?cents=500")).status_code == 201


async def test_a_request_of_the_wrong_shape_is_a_422_that_names_each_mistake(client: httpx.AsyncClient) -> None:
    answer = await client.post("/payments/one?cents=many")

    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["title"] == "Unprocessable Content"
    assert [mistake["loc"] for mistake in answer.json()["errors"]] == [["path", "number"], ["query", "cents"]]
    assert "input" not in answer.text


async def test_a_message_that_can_not_be_read_is_a_422_with_its_reason(client: httpx.AsyncClient) -> None:
    answer = await client.post("/letters")

    assert answer.status_code == 422
    assert answer.json()["reason"] == "undecodable"
    assert answer.json()["detail"] == "the letter is in no known alphabet"
