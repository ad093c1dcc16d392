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
    """A one-dimensional array, ready to be sent. Its subclass has the type's oid."""

    oid: int


class _Int2Array(Array):
    oid = 1005


class _Int4Array(Array):
    oid = 1007


class _Int8Array(Array):
    oid = 1016


class _TextArray(Array):
    oid = 1009


class _UuidArray(Array):
    oid = 2951


class _ByteaArray(Array):
    oid = 1001


class _BoolArray(Array):
    oid = 1000


class _Float8Array(Array):
    oid = 1022


class _TimestamptzArray(Array):
    oid = 1185


class _Int8(Array):
    oid = 20


def int8(value: int) -> Array:
    """A single number, for the statements that take one beside their arrays."""
    return _Int8(_pack_int8(value))


def array_of(column: Column) -> Array | None:
    """A Column of one known type as an array; None for any other, which psycopg shall send."""
    kind = _kind_of(column)
    if kind is None:
        return None
    element_oid, array, encode = _ELEMENTS[kind]
    parts = [_NULL if value is None else _sized(encode(value)) for value in column]
    return array(_header(len(column), element_oid, None in column) + b"".join(parts))


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
    for array, dumper in _DUMPERS.items():
        context.adapters.register_dumper(array, dumper)
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

    def dump(self, obj: Array) -> bytes:
        return obj


_DUMPERS: dict[type[Array], type[_ArrayDumper]] = {
    array: type(f"{array.__name__}Dumper", (_ArrayDumper,), {"oid": array.oid})
    for array in (_Int2Array, _Int4Array, _Int8Array, _TextArray, _UuidArray, _ByteaArray, _Int8)
}


def _timestamp(value: datetime) -> bytes:
    delta = value - _EPOCH
    return _pack_int8((delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds)


_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""PostgreSQL counts microseconds from here."""
_pack_int8 = struct.Struct("!q").pack
_pack_float8 = struct.Struct("!d").pack
_ELEMENTS: dict[type, tuple[int, type[Array], Callable[[Any], bytes]]] = {
    UUID: (2950, _UuidArray, lambda value: value.bytes),
    str: (25, _TextArray, str.encode),
    int: (20, _Int8Array, _pack_int8),
    bool: (16, _BoolArray, lambda value: b"\x01" if value else b"\x00"),
    float: (701, _Float8Array, _pack_float8),
    bytes: (17, _ByteaArray, bytes),
    datetime: (1184, _TimestamptzArray, _timestamp),
}
"""For each type: the oid of an element, the array, and an element's bytes. The statement casts to what it wants."""


class _ColumnDumper(ListDumper):
    """Sends a Column of one known type in binary, anything else as psycopg sends a list."""

    def get_key(self, obj: Column, format: PyFormat) -> Any:  # type: ignore[override]
        kind = _kind_of(obj)
        return super().get_key(obj, format) if kind is None else (Column, kind)

    def upgrade(self, obj: Column, format: PyFormat) -> Any:  # type: ignore[override]
        kind = _kind_of(obj)
        return super().upgrade(obj, format) if kind is None else _COLUMN_DUMPERS[kind](Column)


class _OneKindDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Column) -> bytes | None:
        return array_of(obj)


_COLUMN_DUMPERS: dict[type, type[_OneKindDumper]] = {
    kind: type(f"_{kind.__name__.title()}ColumnDumper", (_OneKindDumper,), {"oid": array.oid})
    for kind, (_, array, _) in _ELEMENTS.items()
}


def _kind_of(column: Column) -> type | None:
    kinds = set(map(type, column))
    kinds.discard(type(None))
    if not kinds:
        return str  # nothing but NULLs, and those have any type
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is datetime and any(value is not None and value.tzinfo is None for value in column):
        return None
    return kind if kind in _ELEMENTS else None
