"""Broker, store and claims inside the process: for tests, for the demo, and for programs that need no servers."""

from orderbus.adapters.memory.broker import MemoryBroker, open_broker
from orderbus.adapters.memory.claims import MemoryClaims, open_claims
from orderbus.adapters.memory.store import MemoryStore, open_store

__all__ = ["MemoryBroker", "MemoryClaims", "MemoryStore", "open_broker", "open_claims", "open_store"]
