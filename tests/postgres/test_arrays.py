"""Arrays arrive at the server as they were made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from orderbus import columns
from orderbus.adapters.postgres.arrays import (
    Array,
    array_of,
    bytea_array,
    int2_array,
    int4_array,
    int8_array,
    register,
    text_array,
    uuid_array,
)

pytestmark = pytest.mark.servers

KINDS: dict[str, tuple[Callable[[Any], Array], st.SearchStrategy[Any]]] = {
    "smallint": (int2_array, st.integers(-(2**15), 2**15 - 1)),
    "integer": (int4_array, st.integers(-(2**31), 2**31 - 1)),
    "bigint": (int8_array, st.integers(-(2**63), 2**63 - 1)),
    "uuid": (uuid_array, st.builds(UUID, int=st.integers(0, 2**128 - 1))),
    "bytea": (bytea_array, st.binary(max_size=50)),
    "text": (text_array, st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))),
}

COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "bigint": st.integers(-(2**63), 2**63 - 1),
    "uuid": st.builds(UUID, int=st.integers(0, 2**128 - 1)),
    "bytea": st.binary(max_size=50),
    "text": st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    "boolean": st.booleans(),
    "double precision": st.floats(allow_nan=False),
    "timestamp with time zone": st.datetimes(
        min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC)
    ),
    "date": st.dates(min_value=date(1, 1, 1)),
}


@pytest.fixture(scope="module")
def connection(postgres_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_of_any_values_comes_back_as_it_was(connection: psycopg.Connection[Any], kind: str) -> None:
    make, values = KINDS[kind]

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(values, max_size=20))
    def comes_back(sent: Sequence[Any]) -> None:
        cursor = connection.cursor(binary=True)
        register(cursor)
        cursor.execute("select pg_typeof(a)::text, a from (select %b as a) x", (make(sent),))
        assert cursor.fetchone() == (f"{kind}[]", sent)

    comes_back()


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_any_values_comes_back_as_it_was(connection: psycopg.Connection[Any], kind: str) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.none() | COLUMNS[kind], max_size=20))
    def comes_back(sent: list[Any]) -> None:
        cursor = connection.cursor(binary=True)
        register(cursor)
        cursor.execute(f"select %s::{kind}[]", columns([(value,) for value in sent]) or ([],))
        assert cursor.fetchone() == (sent,)

    comes_back()


def test_a_number_of_a_column_that_fits_no_bigint_is_refused_and_not_taken_for_null(connection: psycopg.Connection[Any]) -> None:
    cursor = connection.cursor()
    register(cursor)
    with pytest.raises(psycopg.errors.NumericValueOutOfRange):
        cursor.execute("select %s::bigint[]", columns([(1,), (2**63,)]))
    assert array_of(columns([(2**63,)])[0]) is None


def test_a_column_of_mixed_types_is_refused_by_name(connection: psycopg.Connection[Any]) -> None:
    cursor = connection.cursor()
    register(cursor)
    with pytest.raises(psycopg.DataError, match=r"cannot dump lists of mixed types"):
        cursor.execute("select %s::text[]", columns([(1,), ("a",)]))


@pytest.mark.parametrize(("make", "value"), [(int2_array, 2**15), (int4_array, 2**31), (int8_array, 2**63)])
def test_a_number_that_does_not_fit_is_refused(make: Callable[[Any], Array], value: int) -> None:
    with pytest.raises(Exception, match=r"format requires|too large"):
        make([value])
