"""What commands print: JSON for programs, tables for people; nothing that a message says can command the terminal."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    sys.stdout.write(msgspec.json.encode(value, enc_hook=repr).decode() + "\n")
    sys.stdout.flush()


def console() -> Console:
    """Stdout, as wide as the terminal; rich heeds NO_COLOR. Markup is off: texts come from messages and users."""
    return Console(markup=False, highlight=False, emoji=False)


def error_console() -> Console:
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def plain(text: object, *, most: int = 2_000) -> str:
    """A text of unknown origin made harmless: control characters (a terminal would obey them) are shown as escapes."""
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[:most]}… ({len(shown)} characters)"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "backslashreplace").decode() for c in shown)


def dim(text: object) -> Text:
    return Text(plain(text), style="dim")
