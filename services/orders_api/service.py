"""The API's bus: it handles nothing, and emits OrderPlaced."""

from __future__ import annotations

from orderbus import Bus

bus = Bus("orders-api")
