"""Rows turned into columns: what `unnest` takes, so that one statement writes any number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from orderbus.errors import UsageError


class Column(list[Any]):
    """The values of one column. PostgreSQL's adapter sends it as an array, in binary where it knows the type."""


def columns(rows: Iterable[Sequence[Any]]) -> list[Column]:
    """A Column for each position of the rows: the parameters of a statement with `unnest`. Raises UsageError for rows of unequal length.

    The statement gives each its type, since Python's are not PostgreSQL's: `unnest(%s::uuid[], %s::integer[])`.

    Examples:
        >>> columns([(1, "a"), (2, "b")])
        [[1, 2], ['a', 'b']]
    """
    try:
        return [Column(values) for values in zip(*rows, strict=True)]
    except ValueError:
        raise UsageError("columns: the rows are not of one length", code="OB415") from None
