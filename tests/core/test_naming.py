"""How errors name things: where something was defined, and what was probably meant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from orderbus._core.naming import line_of_caller, nearest, place_of


def defined_here() -> None: ...


class Nameless:
    def __repr__(self) -> str:
        return "<a callable>"


def test_a_function_is_named_with_its_file_and_the_line_of_its_definition() -> None:
    line = defined_here.__code__.co_firstlineno

    assert place_of(defined_here) == f"defined_here ({__file__}:{line})"


@pytest.mark.parametrize(
    ("function", "named"),
    [(int, "int"), (Nameless(), "<a callable>"), (functools.partial(int, base=2), "functools.partial(<class 'int'>, base=2)")],
)
def test_what_has_no_line_is_named_by_its_name_or_as_it_is_printed(function: Callable[..., Any], named: str) -> None:
    assert place_of(function) == named


def test_a_line_is_that_of_who_called_the_function_that_asks() -> None:
    def asks() -> tuple[str, str]:
        return line_of_caller(0), line_of_caller(1)

    def calls() -> tuple[str, str]:
        return asks()

    asked, called = (asks.__code__.co_firstlineno + 1, calls.__code__.co_firstlineno + 1)
    assert calls() == (f"{__file__}:{asked}", f"{__file__}:{called}")


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("orders.plcaed", ["orders.paid", "orders.placed"], "orders.placed"),
        ("ordr_id", {"cents": 1, "order_id": 2}, "order_id"),
        ("abcde", ["abcxy"], "abcxy"),
        ("abcde", ["abxyz"], None),
        ("x", [], None),
    ],
)
def test_the_word_that_was_meant_is_the_one_most_like_it_and_none_that_is_a_guess(
    word: str, known: Iterable[str], meant: str | None
) -> None:
    assert nearest(word, known) == meant
