"""Redis: claims on idempotency keys, with a lease and a token. Needs `orderbus[redis]`; speaks asyncio only."""

from orderbus.adapters.redis.claims import RedisClaims, open_claims

__all__ = ["RedisClaims", "open_claims"]
