"""The load, as a locust file: orders at a steady rate, each accepted one remembered by its id.

Run by the demo's driver; by hand: `locust -f services/demo/load.py --headless -u 100 -t 20s --host http://127.0.0.1:8000`.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
from locust import User, constant_throughput, events, task

from services.demo.http import Client, HttpError

RATE = float(os.environ.get("DEMO_RATE", "100"))
USERS = int(os.environ.get("DEMO_USERS", "100"))
SEED = int(os.environ.get("DEMO_SEED", "1"))
OUTPUT = os.environ.get("DEMO_LOAD_OUTPUT", "")

CUSTOMERS = 5_000
ARTICLES = 100
SCARCE = "article-00001"
SCARCE_SHARE = 0.01
EXPENSIVE_SHARE = 0.01
KEYED_SHARE = 0.1
REPEATED_SHARE = 0.01

rng = random.Random(SEED)
accepted: list[str] = []
times_ms: dict[int, list[float]] = defaultdict(list)
failures: dict[str, int] = defaultdict(int)
answers: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
"""By second: status, or "none" where no answer came, → how often."""
mismatched: list[str] = []


def body() -> bytes:
    """An order of one to three lines; now and then one that payment declines, or that asks for the scarce article."""
    lines = [
        {"sku": f"article-{rng.randint(2, ARTICLES):05d}", "quantity": rng.randint(1, 3), "unit_cents": rng.randint(100, 9_999)}
        for _ in range(rng.randint(1, 3))
    ]
    if rng.random() < SCARCE_SHARE:
        lines[0]["sku"] = SCARCE
    if rng.random() < EXPENSIVE_SHARE:
        lines[0]["unit_cents"] = 1_000_000
    return orjson.dumps({"customer_id": str(UUID(int=rng.randrange(CUSTOMERS))), "lines": lines})


BODIES = [body() for _ in range(5_000)]


class Customer(User):
    """Places orders; a tenth of them under an Idempotency-Key, some of which are sent twice."""

    wait_time = constant_throughput(RATE / USERS)

    def on_start(self) -> None:
        assert self.host is not None
        self.client = Client(self.host)

    def on_stop(self) -> None:
        self.client.close()

    @task
    def place(self) -> None:
        order = rng.choice(BODIES)
        if rng.random() >= KEYED_SHARE:
            self.post(order)
            return
        key = f'idempotency-key: "{rng.getrandbits(128):032x}"\r\n'
        first = self.post(order, key)
        if first is not None and rng.random() < REPEATED_SHARE / KEYED_SHARE:
            again = self.post(order, key, repeated=True)
            if again is not None and again != first:
                mismatched.append(first)

    def post(self, order: bytes, headers: str = "", *, repeated: bool = False) -> str | None:
        began = time.perf_counter()
        failure: Exception | None = None
        status, answer = 0, b""
        try:
            status, answer = self.client.post("/orders", order, headers)
            if status not in (200, 201):
                failure = HttpError(f"HTTP {status}")
        except (OSError, HttpError) as error:
            failure = error
        elapsed_ms = (time.perf_counter() - began) * 1000
        second = int(time.time())
        times_ms[second].append(elapsed_ms)
        answers[second][str(status or "none")] += 1
        self.environment.events.request.fire(
            request_type="POST",
            name="/orders",
            response_time=elapsed_ms,
            response_length=len(answer),
            exception=failure,
            context={},
        )
        if failure is not None:
            failures[str(failure) or type(failure).__name__] += 1
            return None
        order_id: str = orjson.loads(answer)["order_id"]
        if not repeated:
            accepted.append(order_id)
        return order_id


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def settle_down(**_: Any) -> None:
    """The collector would go through all of locust and these bodies again and again, in the middle of requests."""
    gc.collect()
    gc.freeze()


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def report(environment: Any, **_: Any) -> None:
    """Hand everything over to the driver, as it was counted."""
    if OUTPUT:
        result = {
            "accepted": accepted,
            "requests": sum(len(second) for second in times_ms.values()),
            "failures": failures,
            "mismatched": mismatched,
            "times_ms": {str(second): values for second, values in times_ms.items()},
            "answers": {str(second): found for second, found in answers.items()},
        }
        Path(OUTPUT).write_bytes(orjson.dumps(result))
