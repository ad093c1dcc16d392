"""The demo's customers, as many at a time as LOAD_PROFILE says. By hand:

LOAD_PROFILE=spike LOAD_SECONDS=60 DEMO_RATE=1000 DEMO_USERS=100 locust -f tests/load/locustfile.py --host http://127.0.0.1:8000
"""

from __future__ import annotations

import os
from typing import ClassVar

from locust import LoadTestShape

from services.demo.load import USERS, Customer
from tests.load.profiles import PROFILES

__all__ = ["Customer", "Shape"]

SECONDS = float(os.environ.get("LOAD_SECONDS", "60"))


class Shape(LoadTestShape):  # type: ignore[misc]  # locust has no types
    profile: ClassVar[str] = os.environ.get("LOAD_PROFILE", "steady")

    def tick(self) -> tuple[int, float] | None:
        """How many users from now on, and how many may begin a second; None ends the load."""
        at = self.get_run_time() / SECONDS
        if at >= 1:
            return None
        return max(round(USERS * PROFILES[self.profile](at)), 1), float(USERS)
