"""Columns of values as PostgreSQL arrays in their binary form, so that a batch of any size is one statement with few parameters.

psycopg dumps a list element by element in Python, and bytea in an array as hexadecimal text; these are a join each.
Format: `array_recv` in src/backend/utils/adt/arrayfuncs.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from psycopg.abc import AdaptContext
from psycopg.adapt import Dumper, PyFormat
from psycopg.pq import Format
from psycopg.types.array import ListDumper

from orderbus._core.columns import Column

__all__ = ["Array", "bytea_array", "int2_array", "int4_array", "int8_array", "register", "text_array", "uuid_array"]


class Array(bytes):
    """A one-dimensional array, ready to be sent. Its subclass names the type."""


class _Int2Array(Array): ...


class _Int4Array(Array): ...


class _Int8Array(Array): ...


class _TextArray(Array): ...


class _UuidArray(Array): ...


class _ByteaArray(Array): ...


def int2_array(values: Sequence[int]) -> Array:
    return _Int2Array(_header(len(values), 21) + struct.pack("!" + "ih" * len(values), *_with_sizes(2, values)))


def int4_array(values: Sequence[int]) -> Array:
    return _Int4Array(_header(len(values), 23) + struct.pack("!" + "ii" * len(values), *_with_sizes(4, values)))


def int8_array(values: Sequence[int]) -> Array:
    return _Int8Array(_header(len(values), 20) + struct.pack("!" + "iq" * len(values), *_with_sizes(8, values)))


def uuid_array(values: Sequence[UUID]) -> Array:
    return _UuidArray(_header(len(values), 2950) + b"".join(b"\x00\x00\x00\x10" + value.bytes for value in values))


def bytea_array(values: Sequence[bytes]) -> Array:
    return _ByteaArray(_header(len(values), 17) + b"".join(_sized(value) for value in values))


def text_array(values: Sequence[str | None]) -> Array:
    """None becomes NULL. A NUL character is refused by the server: no text of PostgreSQL can hold one."""
    has_null = None in values
    return _TextArray(
        _header(len(values), 25, has_null) + b"".join(_NULL if value is None else _sized(value.encode()) for value in values)
    )


def register(context: AdaptContext) -> None:
    """Teach a connection or a cursor to send arrays of this module, and Columns as such."""
    for dumper in _DUMPERS:
        context.adapters.register_dumper(dumper.array, dumper)
    context.adapters.register_dumper(Column, _ColumnDumper)


_NULL = b"\xff\xff\xff\xff"
_pack_size = struct.Struct("!i").pack


def _header(count: int, element_oid: int, has_null: bool = False) -> bytes:
    if not count:
        return struct.pack("!iii", 0, 0, element_oid)
    return struct.pack("!iiiii", 1, has_null, element_oid, count, 1)


def _sized(value: bytes) -> bytes:
    return _pack_size(len(value)) + value


def _with_sizes(size: int, values: Iterable[int]) -> Iterable[int]:
    for value in values:
        yield size
        yield value


class _ArrayDumper(Dumper):
    format = Format.BINARY
    array: type[Array]

    def dump(self, obj: Array) -> bytes:
        return obj


def _dumper(array: type[Array], oid: int) -> type[_ArrayDumper]:
    return type(f"{array.__name__}Dumper", (_ArrayDumper,), {"oid": oid, "array": array})


_DUMPERS = (
    _dumper(_Int2Array, 1005),
    _dumper(_Int4Array, 1007),
    _dumper(_Int8Array, 1016),
    _dumper(_TextArray, 1009),
    _dumper(_UuidArray, 2951),
    _dumper(_ByteaArray, 1001),
)


def _timestamp(value: datetime) -> bytes:
    delta = value - _EPOCH
    return _pack_int8((delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds)


_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""PostgreSQL counts microseconds from here."""
_pack_int8 = struct.Struct("!q").pack
_pack_float8 = struct.Struct("!d").pack
_ELEMENTS: dict[type, tuple[int, int, Callable[[Any], bytes]]] = {
    UUID: (2950, 2951, lambda value: value.bytes),
    str: (25, 1009, str.encode),
    int: (20, 1016, _pack_int8),
    bool: (16, 1000, lambda value: b"\x01" if value else b"\x00"),
    float: (701, 1022, _pack_float8),
    bytes: (17, 1001, bytes),
    datetime: (1184, 1185, _timestamp),
}
"""For each type: the oid of an element and of its array, and the element's bytes. The statement casts to what it wants."""


class _ColumnDumper(ListDumper):
    """Sends a Column of one known type in binary, anything else as psycopg sends a list."""

    def get_key(self, obj: Column, format: PyFormat) -> Any:  # type: ignore[override]
        kind = _kind_of(obj)
        return super().get_key(obj, format) if kind is None else (Column, kind)

    def upgrade(self, obj: Column, format: PyFormat) -> Any:  # type: ignore[override]
        kind = _kind_of(obj)
        return super().upgrade(obj, format) if kind is None else _COLUMN_DUMPERS[kind](Column)


def _kind_of(column: Column) -> type | None:
    kinds = set(map(type, column))
    kinds.discard(type(None))
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is datetime and any(value is not None and value.tzinfo is None for value in column):
        return None
    return kind if kind in _ELEMENTS else None


class _OneKindDumper(Dumper):
    format = Format.BINARY
    element_oid: int
    encode: Callable[[Any], bytes]

    def dump(self, obj: Column) -> bytes:
        encode = type(self).encode
        parts = [_NULL if value is None else _sized(encode(value)) for value in obj]
        return _header(len(obj), self.element_oid, None in obj) + b"".join(parts)


_COLUMN_DUMPERS: dict[type, type[_OneKindDumper]] = {
    kind: type(
        f"_{kind.__name__.title()}ColumnDumper",
        (_OneKindDumper,),
        {"oid": array_oid, "element_oid": element_oid, "encode": staticmethod(encode)},
    )
    for kind, (element_oid, array_oid, encode) in _ELEMENTS.items()
}
