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

__all__ = [
    "Array",
    "bytea_array",
    "float8",
    "int2_array",
    "int4_array",
    "int8",
    "int8_array",
    "register",
    "text",
    "text_array",
    "uuid_array",
]


class Array(bytes):
    """A one-dimensional array (or a single value) in PostgreSQL's binary form, with the oid of its type."""

    oid: int


def array_of(column: Column) -> Array | None:
    """A Column of one known type as an array; None for any other, which psycopg shall send."""
    kind = _kind_of(column)
    if kind is None:
        return None
    element_oid, array_oid, encode = _ELEMENTS[kind]
    parts = [_NULL if value is None else _sized(encode(value)) for value in column]
    return _array(array_oid, element_oid, len(column), b"".join(parts), None in column)


def int8(value: int) -> Array:
    """A single number, for the statements that take one beside their arrays."""
    return _single(20, _pack_int8(value))


def float8(value: float) -> Array:
    return _single(701, _pack_float8(value))


def text(value: str) -> Array:
    return _single(25, value.encode())


def int2_array(values: Sequence[int]) -> Array:
    return _array(1005, 21, len(values), struct.pack("!" + "ih" * len(values), *_with_sizes(2, values)))


def int4_array(values: Sequence[int]) -> Array:
    return _array(1007, 23, len(values), struct.pack("!" + "ii" * len(values), *_with_sizes(4, values)))


def int8_array(values: Sequence[int]) -> Array:
    return _array(1016, 20, len(values), struct.pack("!" + "iq" * len(values), *_with_sizes(8, values)))


def uuid_array(values: Sequence[UUID]) -> Array:
    return _array(2951, 2950, len(values), b"".join([b"\x00\x00\x00\x10" + value.bytes for value in values]))


def bytea_array(values: Sequence[bytes]) -> Array:
    return _array(1001, 17, len(values), b"".join([_sized(value) for value in values]))


def text_array(values: Sequence[str | None]) -> Array:
    """None becomes NULL. A NUL character is refused by the server: no text of PostgreSQL can hold one."""
    parts = [_NULL if value is None else _sized(value.encode()) for value in values]
    return _array(1009, 25, len(values), b"".join(parts), None in values)


def register(context: AdaptContext) -> None:
    """Teach a connection or a cursor to send arrays of this module, and Columns as such."""
    context.adapters.register_dumper(Array, _ArrayDumper)
    context.adapters.register_dumper(Column, _ColumnDumper)


_NULL = b"\xff\xff\xff\xff"
_pack_size = struct.Struct("!i").pack
_pack_int8 = struct.Struct("!q").pack
_pack_float8 = struct.Struct("!d").pack


def _single(oid: int, value: bytes) -> Array:
    single = Array(value)
    single.oid = oid
    return single


def _array(oid: int, element_oid: int, count: int, elements: bytes, has_null: bool = False) -> Array:
    head = struct.pack("!iiiii", 1, has_null, element_oid, count, 1) if count else struct.pack("!iii", 0, 0, element_oid)
    array = Array(head + elements)
    array.oid = oid
    return array


def _sized(value: bytes) -> bytes:
    return _pack_size(len(value)) + value


def _with_sizes(size: int, values: Iterable[int]) -> Iterable[int]:
    for value in values:
        yield size
        yield value


class _ArrayDumper(Dumper):
    """psycopg keeps a dumper for each key: here, for each type of the array."""

    format = Format.BINARY

    def get_key(self, obj: Array, format: PyFormat) -> Any:
        return Array, obj.oid

    def upgrade(self, obj: Array, format: PyFormat) -> Dumper:
        dumper = _ArrayDumper(Array)
        dumper.oid = obj.oid
        return dumper

    def dump(self, obj: Array) -> bytes:
        return obj


class _ColumnDumper(ListDumper):
    """Sends a Column of one known type in binary, anything else as psycopg sends a list."""

    def get_key(self, obj: Column, format: PyFormat) -> Any:  # type: ignore[override]
        kind = _kind_of(obj)
        return super().get_key(obj, format) if kind is None else (Column, kind)

    def upgrade(self, obj: Column, format: PyFormat) -> Any:  # type: ignore[override]
        kind = _kind_of(obj)
        return super().upgrade(obj, format) if kind is None else _OneKindDumper(kind)


class _OneKindDumper(Dumper):
    format = Format.BINARY

    def __init__(self, kind: type) -> None:
        super().__init__(Column)
        self.oid = _ELEMENTS[kind][1]

    def dump(self, obj: Column) -> Array | None:
        return array_of(obj)


def _timestamp(value: datetime) -> bytes:
    delta = value - _EPOCH
    return _pack_int8((delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds)


_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""PostgreSQL counts microseconds from here."""
_ELEMENTS: dict[type, tuple[int, int, Callable[[Any], bytes]]] = {
    UUID: (2950, 2951, lambda value: value.bytes),
    str: (25, 1009, str.encode),
    int: (20, 1016, _pack_int8),
    bool: (16, 1000, lambda value: b"\x01" if value else b"\x00"),
    float: (701, 1022, _pack_float8),
    bytes: (17, 1001, bytes),
    datetime: (1184, 1185, _timestamp),
}
"""For each type: the oids of an element and of the array, and an element's bytes. The statement casts to what it wants."""


def _kind_of(column: Column) -> type | None:
    """The type of all values, where it has one binary form for all of them."""
    kinds = set(map(type, column))
    kinds.discard(type(None))
    if not kinds:
        return str  # nothing but NULLs, and those have any type
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is datetime and any(value is not None and value.tzinfo is None for value in column):
        return None
    if kind is int and any(value is not None and not -(1 << 63) <= value < 1 << 63 for value in column):
        return None
    return kind if kind in _ELEMENTS else None
