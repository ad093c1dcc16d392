"""Rows for `unnest`: one statement writes a whole batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    """A list for each column: psycopg sends a list as an array, but a tuple as a row.

    >>> columns([(1, "a"), (2, "b")])
    [[1, 2], ['a', 'b']]
    """
    return [list(column) for column in zip(*rows, strict=True)]
