"""Sample messages of an event class: made from its fields, and read again by the class as it is later.

Made is one value for a plain field, and each case for a field that has cases: the members of an enum or a union, None, True and
False, an empty list, the bounds of a number or a length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import inspect

from orderbus._core.codec import BodyDecoder, encode
from orderbus._core.event import Event, event_key, event_type
from orderbus.errors import MessageError, UsageError

__all__ = ["Sample", "SampleFile", "difference", "missing_fields", "samples_of", "unread", "unread_fields"]

LIMIT_BYTES = 16 << 20
MOST_CASES = 50
DEEPEST = 4
"""How many structs deep a class that holds itself is filled in."""


class Sample(msgspec.Struct, frozen=True):
    """A body as it was sent, as JSON, and the key that it was sent with."""

    body: msgspec.Raw
    key: str | None = None


class SampleFile(msgspec.Struct):
    """The samples of one topic and version."""

    topic: str
    version: int
    samples: list[Sample]


def samples_of(cls: type[Event]) -> list[Sample]:
    """Samples of today's class; together they have all of its cases. The same ones each time.

    Raises UsageError naming the field for which none can be made.
    """
    made = []
    for values in _struct(inspect.type_info(cls), cls.__name__, 0):  # type: ignore[arg-type]
        try:
            event = msgspec.json.decode(msgspec.json.encode(values), type=cls)
        except Exception as error:  # a bound that was not kept, or what the event's own __post_init__ says
            raise UsageError(f"{cls.__name__} refuses what was made up for its fields: {error}", code="OB620") from error
        made.append(Sample(msgspec.Raw(encode(event, limit_bytes=LIMIT_BYTES)), event_key(event)))
    return made


def difference(cls: type[Event], sample: Sample) -> str | None:
    """Why today's class can't be given a message like this one; None where it can."""
    try:
        event = _read(cls, sample)
    except MessageError as error:
        return f"old messages would be parked ({error.reason}): {error}"
    key = event_key(event)
    if key != sample.key:
        return (
            f"its key is {key!r} now, by {event_type(cls).key or 'no field'}, and was {sample.key!r}: events of one key before "
            f"and after the change would have no order among themselves"
        )
    return None


def unread_fields(cls: type[Event], sample: Sample) -> frozenset[str]:
    """The paths of what is in a sample and in no field of today's class; none where it can't be read at all."""
    try:
        event = _read(cls, sample)
    except MessageError:
        return frozenset()
    return frozenset(unread(msgspec.json.decode(sample.body), event))


def _read(cls: type[Event], sample: Sample) -> Event:
    event: Event = BodyDecoder(cls, limit_bytes=LIMIT_BYTES).decode(bytes(sample.body), None)
    return event


def missing_fields(cls: type[Event], samples: Sequence[Sample]) -> list[str]:
    """The fields of today's class that are in no sample, by the names that they are sent by."""
    names = [field.encode_name for field in msgspec.structs.fields(cls)]
    known: set[str] = set()
    for sample in samples:
        body = msgspec.json.decode(sample.body)
        known |= body.keys() if isinstance(body, dict) else set(names[: len(_values(cls, body))])
    return [name for name in names if name not in known]


def unread(sent: Any, read: Any, path: str = "$") -> Iterator[str]:
    """The paths of what is in a body, decoded as it was sent, and in no field of the event that was read from it."""
    if isinstance(read, msgspec.Struct) and isinstance(sent, dict):
        names = {field.encode_name: field.name for field in msgspec.structs.fields(read)}
        for name, value in sent.items():
            if name in names:
                yield from unread(value, getattr(read, names[name]), f"{path}.{name}")
            elif name != read.__struct_config__.tag_field:
                yield f"{path}.{name}"
    elif isinstance(read, msgspec.Struct) and isinstance(sent, list):
        fields = msgspec.structs.fields(read)
        for n, value in enumerate(_values(type(read), sent)):
            if n < len(fields):
                yield from unread(value, getattr(read, fields[n].name), f"{path}.{fields[n].encode_name}")
            else:
                yield f"{path}[{n}]"
    elif isinstance(sent, dict) and isinstance(read, dict):
        for name, value in sent.items():
            yield from unread(value, read.get(name), f"{path}.{name}")
    elif isinstance(sent, list) and isinstance(read, (list, tuple)):
        for n, (value, inner) in enumerate(zip(sent, read, strict=False)):
            yield from unread(value, inner, f"{path}[{n}]")


def _values(cls: type[msgspec.Struct], sent: list[Any]) -> list[Any]:
    """Those of the fields, in their order, of a struct that is sent as an array: its tag comes before them."""
    return sent[1:] if cls.__struct_config__.tag is not None else sent


def _struct(kind: inspect.StructType, path: str, depth: int) -> list[Any]:
    """As many as its field with the most cases has."""
    cases = {field.encode_name: _cases(field.type, f"{path}.{field.name}", depth + 1) for field in kind.fields}
    count = max((len(values) for values in cases.values()), default=1)
    tag = {} if kind.tag_field is None else {kind.tag_field: kind.tag}
    made = [tag | {name: values[n % len(values)] for name, values in cases.items()} for n in range(min(count, MOST_CASES))]
    return [list(one.values()) for one in made] if kind.array_like else made


def _cases(kind: inspect.Type, path: str, depth: int) -> list[Any]:
    """Values of a type, as JSON has them. The first is the plainest."""
    match kind:
        case inspect.UnionType():
            return [value for inner in sorted(kind.types, key=_is_none) for value in _cases(inner, path, depth)]
        case inspect.NoneType():
            return [None]
        case inspect.BoolType():
            return [True, False]
        case inspect.IntType() | inspect.FloatType():
            return _numbers(kind)
        case inspect.StrType():
            return _texts(kind, path)
        case inspect.BytesType() | inspect.ByteArrayType() | inspect.MemoryViewType():
            return ["Ynl0ZXM="]
        case inspect.EnumType():
            return [member.value for member in kind.cls]
        case inspect.LiteralType():
            return list(kind.values)
        case inspect.StructType() if depth <= DEEPEST:
            return _struct(kind, path, depth)
        case inspect.DataclassType() | inspect.TypedDictType() | inspect.NamedTupleType() if depth <= DEEPEST:
            values = {field.encode_name: _cases(field.type, f"{path}.{field.name}", depth + 1)[0] for field in kind.fields}
            return [list(values.values()) if isinstance(kind, inspect.NamedTupleType) else values]
        case inspect.CollectionType() | inspect.DictType() if depth > DEEPEST and not kind.min_length:
            return [{}] if isinstance(kind, inspect.DictType) else [[]]
        case inspect.TupleType():
            return [[_cases(item, path, depth)[0] for item in kind.item_types]]
        case inspect.CollectionType():
            return _lists(kind, path, depth)
        case inspect.DictType():
            key = _cases(kind.key_type, path, depth)[0]
            return [{key: value} for value in _cases(kind.value_type, path, depth)] + ([] if kind.min_length else [{}])
        case inspect.DateTimeType() | inspect.TimeType():
            date = "2025-01-31T" if isinstance(kind, inspect.DateTimeType) else ""
            return [f"{date}12:30:00{'' if kind.tz is False else 'Z'}"]
        case _:
            for known, value in _PLAIN:
                if isinstance(kind, known):
                    return [value]
    raise UsageError(f"{path}: no sample of {type(kind).__name__.removesuffix('Type')} can be made up", code="OB620")


_PLAIN: tuple[tuple[type[inspect.Type], Any], ...] = (
    (inspect.UUIDType, "01890a5d-ac96-774b-bcce-b302099a8057"),
    (inspect.DateType, "2025-01-31"),
    (inspect.TimeDeltaType, "PT90S"),
    (inspect.DecimalType, "7.50"),
    (inspect.RawType, {"raw": True}),
)


def _is_none(kind: inspect.Type) -> bool:
    return isinstance(kind, inspect.NoneType)


def _numbers(kind: inspect.IntType | inspect.FloatType) -> list[Any]:
    is_whole = isinstance(kind, inspect.IntType)
    step = kind.multiple_of or (1 if is_whole else 0.5)
    low = kind.ge if kind.ge is not None else None if kind.gt is None else kind.gt + step
    high = kind.le if kind.le is not None else None if kind.lt is None else kind.lt - step
    plain = 7 if is_whole else 7.5
    found = [step * math.ceil(low / step)] if low is not None else []
    found += [step * math.floor(high / step)] if high is not None else []
    return list(dict.fromkeys(found)) or [plain if kind.multiple_of is None else step]


def _texts(kind: inspect.StrType, path: str) -> list[str]:
    least = kind.min_length or 0
    most = max(least, min(kind.max_length if kind.max_length is not None else 64, 4096))
    if kind.min_length is None and kind.max_length is None:
        candidates = ["text"]
    else:
        candidates = [("text " * 1024)[: max(least, 1 if most else 0)], ("text " * 1024)[:most]]
    if kind.pattern is not None:
        candidates = [text for text in (*candidates, *_SPECIMENS) if re.search(kind.pattern, text) and least <= len(text) <= most]
        if not candidates:
            raise UsageError(f"{path}: no text can be made up for the pattern {kind.pattern!r}", code="OB620")
        return candidates[:1]
    return list(dict.fromkeys(candidates))


_SPECIMENS = (
    "a",
    "A",
    "7",
    "EUR",
    "eur",
    "abc123",
    "ABC123",
    "a-b",
    "someone@example.org",
    "https://example.org/",
    "2025-01-31",
    "DE",
)
"""Texts that common patterns take."""


def _lists(kind: inspect.CollectionType, path: str, depth: int) -> list[Any]:
    least, most = kind.min_length or 0, kind.max_length
    values = _cases(kind.item_type, path, depth)
    full = values[:most] if most is not None else values
    while len(full) < least:
        full = [*full, values[0]]
    return [full] if least or not full else [full, []]
