"""Reading an order from a body: fast where it is right; where it is wrong, every mistake is named at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, get_args, get_origin

import msgspec

from services.orders_api.orders import NewOrder
from services.orders_api.problem import Mistake, Problem

MOST_MISTAKES = 50

_decode = msgspec.json.Decoder(NewOrder).decode


def read_order(body: bytes) -> NewOrder:
    """Raises Problem: 400 for what is no JSON, 422 naming every wrong field.

    >>> read_order(b'{"lines": []}')
    Traceback (most recent call last):
    services.orders_api.problem.Problem: #/customer_id: is missing; #/lines: Expected `array` of length >= 1
    """
    try:
        try:
            return _decode(body)
        except msgspec.ValidationError as first:
            # msgspec stops at the first mistake, so the body is gone through again, part by part. Raw reads all of it:
            # where it turns out to be no JSON further on, that is said instead.
            raw = msgspec.json.decode(body, type=msgspec.Raw)
            mistakes = tuple(islice(_mistakes(raw, NewOrder, "#"), MOST_MISTAKES)) or (Mistake(str(first), pointer="#"),)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise Problem(400, "the body is nested too deep") from None
    raise Problem(422, "; ".join(f"{mistake.pointer}: {mistake.detail}" for mistake in mistakes[:3]), errors=mistakes)


def _mistakes(raw: msgspec.Raw, kind: Any, pointer: str) -> Iterator[Mistake]:
    """What msgspec finds wrong with each part, by decoding it alone."""
    bare, *constraints = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    is_struct = isinstance(bare, type) and issubclass(bare, msgspec.Struct)
    is_list = get_origin(bare) is tuple
    if is_struct:
        kind = dict[str, msgspec.Raw]
    elif is_list:
        kind = Annotated[(tuple[msgspec.Raw, ...], *constraints)]
    try:
        parts = msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        yield Mistake(str(error), pointer=pointer)
        return
    if is_struct:
        yield from _in_fields(parts, bare, pointer)
    elif is_list:
        for index, part in enumerate(parts):
            yield from _mistakes(part, get_args(bare)[0], f"{pointer}/{index}")


def _in_fields(parts: dict[str, msgspec.Raw], kind: type[msgspec.Struct], pointer: str) -> Iterator[Mistake]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, field in fields.items():
        if name in parts:
            yield from _mistakes(parts[name], field.type, f"{pointer}/{name}")
        elif field.required:
            yield Mistake("is missing", pointer=f"{pointer}/{name}")
    for name in parts:
        if name not in fields:
            shown = name[:80].replace("~", "~0").replace("/", "~1")
            yield Mistake(f"there is no such field; there are {', '.join(fields)}", pointer=f"{pointer}/{shown}")
