"""How errors name things: where something was defined, and what was probably meant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

LIKENESS = 0.6
"""difflib's own measure of two words: below it a proposal would be a guess."""


def place_of(function: Callable[..., Any]) -> str:
    """The name, file and line of a function, for errors."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", None) or repr(function)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def line_of_caller(depth: int) -> str:
    """File and line of the code that called, `depth` calls further out: 1 is who called the function that asks."""
    frame = sys._getframe(depth + 1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of the known words that was probably meant; None where none is like it.

    >>> nearest("orders.plcaed", ["orders.placed", "orders.paid"])
    'orders.placed'
    """
    import difflib  # for those who misspell only

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=LIKENESS)), None)
