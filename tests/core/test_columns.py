"""Rows as columns: one for each position, and only of rows that are alike."""

from __future__ import annotations

import pytest

from orderbus import UsageError
from orderbus._core.columns import Column, columns


def test_each_position_of_the_rows_is_a_column_in_the_order_of_the_rows() -> None:
    made = columns(iter([(1, "a", None), [2, "b", b"x"]]))

    assert made == [[1, 2], ["a", "b"], [None, b"x"]]
    assert all(type(column) is Column for column in made)


def test_no_rows_have_no_columns() -> None:
    assert columns([]) == []


@pytest.mark.parametrize("rows", [[(1, 2), (3,)], [(1,), (2, 3)], [(), (1,)]])
def test_rows_of_unequal_length_are_the_programmers_error(rows: list[tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match=r"^columns: the rows are not of one length \[OB415: ") as raised:
        columns(rows)

    assert raised.value.code == "OB415"
