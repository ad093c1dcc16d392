"""Events: frozen msgspec Structs that know their topic, key and version."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, dataclass_transform, get_args
from uuid import UUID

import msgspec

from orderbus._core.ids import uuid_text
from orderbus._core.naming import line_of_caller, nearest
from orderbus._core.shape import unbounded_field
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
        line = line_of_caller(1)
        if struct_options.setdefault("frozen", True) is not True:
            raise UsageError(
                f"event class {name} ({line}): an event is a fact, so it can't be changed; drop frozen=False", code="OB207"
            )
        struct_options.setdefault("kw_only", True)  # msgspec does not inherit it
        cls = super().__new__(mcls, name, bases, namespace, **struct_options)
        setattr(cls, "__defined_at__", line)  # noqa: B010 - the metaclass has no such attribute, its classes do
        if topic is None:
            if key is not None or version != 1 or unrouted != "keep":
                raise UsageError(
                    f'event class {name} ({line}): key, version and unrouted need a topic; write topic="…" beside them',
                    code="OB202",
                )
            return cls
        declared = EventType(topic, key, version, unrouted)
        setattr(cls, "__event_type__", declared)  # noqa: B010
        _check_arguments(cls, declared)
        return cls


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Event(msgspec.Struct, metaclass=EventMeta, frozen=True, kw_only=True):
    """Something that happened, as a frozen, typed, keyword-only record.

    Class arguments: `topic` (dotted lower-case words, at most 120 bytes), `key` (the field whose value orders events among
    themselves; without it events have no order), `version` (a whole number ≥ 1, sent along for readers), `unrouted`
    (`"keep"`: an event nobody is bound to waits in the stuck table; `"drop"`: it is let go).

    Raises UsageError when the class is defined with arguments or field types that orderbus refuses.

    Examples:
        >>> class OrderPlaced(Event, topic="orders.placed", key="order_id"):
        ...     order_id: int
        >>> OrderPlaced(order_id=7)
        OrderPlaced(order_id=7)
    """

    __event_type__: ClassVar[EventType]
    __defined_at__: ClassVar[str]


def event_type(cls: type[Event]) -> EventType:
    """The topic, key and version of an event class; UsageError for a class that declares none, or is no event."""
    if not (isinstance(cls, type) and issubclass(cls, Event)):
        raise UsageError(f"{cls!r} is not an event class; derive it from orderbus.Event", code="OB201")
    declared: EventType | None = getattr(cls, "__event_type__", None)
    if declared is None:
        raise UsageError(f'{event_place(cls)} has no topic; write class {cls.__name__}(Event, topic="…")', code="OB202")
    if "__checked__" not in cls.__dict__:
        _refuse_memory_bombs(cls)
        cls.__checked__ = True  # type: ignore[attr-defined]
    return declared


def event_place(event: Event | type) -> str:
    """The name, file and line of an event class, or those of an event's class, for errors."""
    if isinstance(event, type):
        return f"event class {event.__name__} ({event.__defined_at__})"  # type: ignore[attr-defined]
    return f"event {type(event).__name__} ({event.__defined_at__})"


def event_key(event: Event) -> str | None:
    """The value of an event's key field as text; None where its class has no key, or the field is None."""
    field = event.__event_type__.key
    if field is None:
        return None
    value = getattr(event, field)
    if type(value) is UUID:
        return uuid_text(value)
    return None if value is None else str(value)


def _check_arguments(cls: type, declared: EventType) -> None:
    place = event_place(cls)
    if not TOPIC.fullmatch(declared.topic) or len(declared.topic) > TOPIC_MAX_BYTES:
        raise UsageError(
            f"{place}: topic {declared.topic!r} must be dotted lower-case words such as "
            f'"orders.placed", at most {TOPIC_MAX_BYTES} bytes',
            code="OB203",
        )
    fields = cls.__struct_fields__  # type: ignore[attr-defined]
    if declared.key is not None and declared.key not in fields:
        near = nearest(declared.key, fields)
        meant = f'; did you mean key="{near}"?' if near else ""
        raise UsageError(f"{place}: key {declared.key!r} is not one of its fields ({', '.join(fields)}){meant}", code="OB204")
    if not isinstance(declared.version, int) or declared.version < 1:
        raise UsageError(f"{place}: version must be a whole number of at least 1, not {declared.version!r}", code="OB205")
    if declared.unrouted not in get_args(Unrouted):
        raise UsageError(f'{place}: unrouted must be "keep" or "drop", not {declared.unrouted!r}', code="OB205")
    try:
        _refuse_memory_bombs(cls)
    except NameError:
        return  # a forward reference: event_type() checks again when the class is first used
    cls.__checked__ = True  # type: ignore[attr-defined]


def _refuse_memory_bombs(cls: type) -> None:
    found = unbounded_field(cls)
    if found is not None:
        raise UsageError(
            f"{event_place(cls)}: field {found[0]!r} may hold anything ({found[1]}), and so a memory bomb; "
            f"give it a definite type, such as list[str], dict[str, int], a Struct, or msgspec.Raw for bytes kept as they are",
            code="OB206",
        )
