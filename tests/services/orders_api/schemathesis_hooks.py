"""Loaded by schemathesis (SCHEMATHESIS_HOOKS)."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import schemathesis

from services.orders_api.idempotency import BARE, QUOTED


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """To JSON Schema 1.0 is an integer; to msgspec, and to this API, it is none. Everything else stays as it was made."""
    if isinstance(body, float) and body.is_integer():
        return int(body)
    if isinstance(body, list):
        return [map_body(context, part) for part in body]
    if isinstance(body, dict):
        return {name: map_body(context, part) for name, part in body.items()}
    return body


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """A key that is well formed becomes one of its own: the same for two orders is refused, and rightly so."""
    key = (case.headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and (QUOTED.fullmatch(key) or BARE.fullmatch(key)):
        case.headers["Idempotency-Key"] = f'"{uuid4()}"'
