"""How a service reads its own settings: a frozen Struct, one prefix in the environment, every mistake named at once."""

from __future__ import annotations

import os
from typing import TypeVar

import msgspec

from orderbus import SettingsError

T = TypeVar("T", bound=msgspec.Struct)


def from_environment(kind: type[T], prefix: str) -> T:
    """Fill a Struct from variables called `prefix` + the field's name in upper case; what is not set keeps its default.

    Raises SettingsError that lists every wrong value.
    """
    values, mistakes = {}, []
    for field in msgspec.structs.fields(kind):
        name = prefix + field.name.upper()
        text = os.environ.get(name, "").strip()
        if not text:
            continue
        try:
            values[field.name] = msgspec.convert(text, field.type, strict=False)
        except msgspec.ValidationError as error:
            mistakes.append(f"{name}: {error}")
    if mistakes:
        raise SettingsError(mistakes)
    return kind(**values)
