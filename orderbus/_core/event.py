"""Events: frozen msgspec Structs that know their topic, key and version."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, ClassVar, Literal, Union, dataclass_transform, get_args, get_origin

import msgspec

from orderbus.errors import UsageError

TOPIC = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)*")
TOPIC_MAX_BYTES = 120

Unrouted = Literal["keep", "drop"]


class EventType(msgspec.Struct, frozen=True):
    """What an event class says of itself."""

    topic: str
    key: str | None
    version: int
    unrouted: Unrouted


class EventMeta(msgspec.StructMeta):
    """Takes `topic=`, `key=`, `version=` and `unrouted=` out of the class arguments. The one metaclass of the project."""

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        topic: str | None = None,
        key: str | None = None,
        version: int = 1,
        unrouted: Unrouted = "keep",
        **struct_options: Any,
    ) -> Any:
        cls = super().__new__(mcls, name, bases, namespace, **struct_options)
        if topic is None:
            if key is not None or version != 1 or unrouted != "keep":
                raise UsageError(f'event class {name}: key, version and unrouted need a topic; write topic="…" beside them')
            return cls
        declared = EventType(topic, key, version, unrouted)
        setattr(cls, "__event_type__", declared)  # noqa: B010 - the metaclass has no such attribute, its classes do
        _check_arguments(name, cls, declared)
        return cls


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Event(msgspec.Struct, metaclass=EventMeta, frozen=True, kw_only=True):
    """Something that happened, as a frozen, typed, keyword-only record.

    Class arguments: `topic` (dotted lower-case words, at most 120 bytes), `key` (the field whose value orders events among
    themselves; without it events have no order), `version` (a whole number ≥ 1, sent along for readers), `unrouted`
    (`"keep"`: an event nobody is bound to waits in the stuck table; `"drop"`: it is let go).

    Raises UsageError when the class is defined with arguments or field types that orderbus refuses.

    >>> class OrderPlaced(Event, topic="orders.placed", key="order_id"):
    ...     order_id: int
    >>> OrderPlaced(order_id=7)
    OrderPlaced(order_id=7)
    """

    __event_type__: ClassVar[EventType]


def event_type(cls: type[Event]) -> EventType:
    """The topic, key and version of an event class; UsageError for a class that declares none, or is no event."""
    if not (isinstance(cls, type) and issubclass(cls, Event)):
        raise UsageError(f"{cls!r} is not an event class; derive it from orderbus.Event")
    declared: EventType | None = getattr(cls, "__event_type__", None)
    if declared is None:
        raise UsageError(f'event class {cls.__name__} has no topic; write class {cls.__name__}(Event, topic="…")')
    if "__checked__" not in cls.__dict__:
        _refuse_memory_bombs(cls)
        cls.__checked__ = True  # type: ignore[attr-defined]
    return declared


def event_key(event: Event) -> str | None:
    """The value of an event's key field as text, or None for an event without a key."""
    field = event.__event_type__.key
    return None if field is None else str(getattr(event, field))


def _check_arguments(name: str, cls: type, declared: EventType) -> None:
    if not TOPIC.fullmatch(declared.topic) or len(declared.topic) > TOPIC_MAX_BYTES:
        raise UsageError(
            f"event class {name}: topic {declared.topic!r} must be dotted lower-case words such as "
            f'"orders.placed", at most {TOPIC_MAX_BYTES} bytes'
        )
    fields = cls.__struct_fields__  # type: ignore[attr-defined]
    if declared.key is not None and declared.key not in fields:
        raise UsageError(f"event class {name}: key {declared.key!r} is not one of its fields ({', '.join(fields)})")
    if not isinstance(declared.version, int) or declared.version < 1:
        raise UsageError(f"event class {name}: version must be a whole number of at least 1, not {declared.version!r}")
    if declared.unrouted not in get_args(Unrouted):
        raise UsageError(f'event class {name}: unrouted must be "keep" or "drop", not {declared.unrouted!r}')
    try:
        _refuse_memory_bombs(cls)
    except NameError:
        return  # a forward reference: event_type() checks again when the class is first used
    cls.__checked__ = True  # type: ignore[attr-defined]


def _refuse_memory_bombs(cls: type) -> None:
    """A 16 MiB body of `[]` decoded into Any costs 396 MiB: every field must have a type that bounds its shape."""
    for field, hint in typing.get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is ClassVar or field.startswith("__"):
            continue
        bomb = _bomb_in(hint, seen=set())
        if bomb is not None:
            raise UsageError(
                f"event class {cls.__name__}: field {field!r} may hold anything ({bomb}), and so a memory bomb; "
                f"give it a definite type, such as list[str], dict[str, int], a Struct, or msgspec.Raw for bytes kept as they are"
            )


def _bomb_in(hint: Any, seen: set[Any]) -> str | None:
    if hint is Any or hint is object:
        return "Any" if hint is Any else "object"
    if hint in (dict, list, set, frozenset, tuple, Mapping) or hint in (
        dict, list, set, frozenset, tuple, typing.Mapping, typing.Sequence,
    ):  # fmt: skip
        return f"bare {getattr(hint, '__name__', None) or hint}"
    if isinstance(hint, typing.TypeVar):
        return f"unbound type variable {hint}"
    origin = get_origin(hint)
    if origin is Literal:
        return None
    if origin is typing.Annotated:
        return _bomb_in(get_args(hint)[0], seen)
    if origin in (Union, UnionType) or origin is not None:
        for part in get_args(hint):
            if part is not Ellipsis and (found := _bomb_in(part, seen)) is not None:
                return found
        return None
    if isinstance(hint, type) and hasattr(hint, "__annotations__") and hint not in seen:
        seen.add(hint)
        if issubclass(hint, msgspec.Struct) or _is_record(hint):
            for name, inner in typing.get_type_hints(hint, include_extras=True).items():
                if get_origin(inner) is not ClassVar and (found := _bomb_in(inner, seen)) is not None:
                    return f"{found} in {hint.__name__}.{name}"
    return None


def _is_record(hint: type) -> bool:
    import dataclasses

    return dataclasses.is_dataclass(hint) or issubclass(hint, dict) or hasattr(hint, "_fields")
