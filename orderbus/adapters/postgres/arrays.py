"""Columns of values as PostgreSQL arrays in their binary form, so that a batch of any size is one statement with few parameters.

psycopg dumps a list element by element in Python, and bytea in an array as hexadecimal text; these are a join each.
Format: `array_recv` in src/backend/utils/adt/arrayfuncs.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from psycopg import AsyncCursor, Cursor
from psycopg.adapt import Dumper
from psycopg.pq import Format

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


def register(cursor: AsyncCursor[Any] | Cursor[Any]) -> None:
    """Teach a cursor to send arrays of this module."""
    for dumper in _DUMPERS:
        cursor.adapters.register_dumper(dumper.array, dumper)


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
