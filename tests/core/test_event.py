"""Event classes: what their arguments may be, and which fields are refused for what could be decoded into them."""

import collections.abc
import dataclasses
import re
import typing
from enum import Enum
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar
from uuid import UUID

import msgspec
import pytest

from orderbus import Event, UsageError
from orderbus._core.event import EventMeta, event_key, event_type

T = TypeVar("T")


class Placed(Event, topic="orders.placed", key="order_id"):
    order_id: int
    note: str = ""


class Line(msgspec.Struct):
    sku: str
    amounts: list[int]


class Loose(msgspec.Struct):
    anything: Any


class Box(msgspec.Struct, Generic[T]):
    content: T


class LooseBox(msgspec.Struct, Generic[T]):
    content: T
    rest: dict


class Node(msgspec.Struct):
    children: "list[Node]"


@dataclasses.dataclass
class LooseData:
    parts: list


class LooseDict(TypedDict):
    parts: object


class LooseTuple(NamedTuple):
    parts: Any


class LooseAttrs:
    """As the attrs library leaves a class."""

    __attrs_attrs__ = ()
    parts: list


class LooseSpecial(msgspec.Struct):
    """To msgspec a field like any other."""

    __parts__: Any


class TitledBox(msgspec.Struct, Generic[T]):
    content: Annotated[T, msgspec.Meta(title="x")]


class Colour(Enum):
    RED = "red"


Id = NewType("Id", UUID)
LooseAlias = NewType("LooseAlias", dict)


def event_with(hint: Any, **arguments: Any) -> Any:
    return EventMeta("Made", (Event,), {"__annotations__": {"field": hint}, "__module__": __name__}, topic="made", **arguments)


def test_an_event_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Placed(order_id=1).order_id = 2


def test_an_event_takes_its_fields_by_name_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        Placed(1)


def test_a_required_field_may_follow_an_optional_one() -> None:
    class Late(Event, topic="late"):
        first: int = 1
        second: str

    assert Late(second="x") == Late(first=1, second="x")


def test_an_event_that_could_be_changed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"event class Made \(.*\.py:\d+\): .* drop frozen=False \[OB207: "):
        event_with(int, frozen=False)


@pytest.mark.parametrize(
    ("topic", "is_good"),
    [
        ("orders", True),
        ("orders.placed", True),
        ("orders.v2.placed-now_1", True),
        ("o." * 59 + "ab", True),
        ("o." * 60 + "a", False),
        ("", False),
        ("Orders.placed", False),
        ("orders..placed", False),
        (".orders", False),
        ("orders.", False),
        ("orders.*", False),
        ("orders.#", False),
        ("orders placed", False),
        ("bestellungen.ü", False),
        ("orders.placed\n", False),
        ("1orders", False),
    ],
)
def test_a_topic_is_dotted_lower_case_words_of_at_most_120_bytes(topic: str, is_good: bool) -> None:
    if is_good:
        cls = EventMeta("Made", (Event,), {}, topic=topic)
        assert event_type(cls).topic == topic
    else:
        with pytest.raises(
            UsageError, match=r"event class Made \(.*\.py:\d+\): topic .* must be dotted .* at most 120 bytes \[OB203: "
        ):
            EventMeta("Made", (Event,), {}, topic=topic)


def test_a_key_that_is_no_field_is_refused_with_the_fields_named() -> None:
    with pytest.raises(
        UsageError, match=r"event class Wrong \(.*\.py:\d+\): key 'id' is not one of its fields \(order_id\) \[OB204: "
    ):

        class Wrong(Event, topic="wrong", key="id"):
            order_id: int


def test_a_misspelt_key_is_answered_with_the_field_that_was_meant() -> None:
    with pytest.raises(
        UsageError, match=r'is not one of its fields \(order_id, cents\); did you mean key="order_id"\? \[OB204: '
    ):

        class Wrong(Event, topic="wrong", key="ordr_id"):
            order_id: int
            cents: int


@pytest.mark.parametrize("version", [0, -1, "2", 1.5])
def test_a_version_that_is_no_whole_number_from_1_is_refused(version: Any) -> None:
    with pytest.raises(
        UsageError, match=r"event class Made \(.*\.py:\d+\): version must be a whole number of at least 1, not .* \[OB205: "
    ):
        event_with(int, version=version)


def test_an_unknown_word_for_unrouted_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r'event class Made \(.*\.py:\d+\): unrouted must be "keep" or "drop", not .lose. \[OB205: '
    ):
        event_with(int, unrouted="lose")


@pytest.mark.parametrize("arguments", [{"key": "field"}, {"version": 2}, {"unrouted": "drop"}])
def test_arguments_without_a_topic_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(
        UsageError, match=r"event class Made \(.*\.py:\d+\): key, version and unrouted need a topic; .* \[OB202: "
    ):
        EventMeta("Made", (Event,), {"__annotations__": {"field": int}}, **arguments)


def test_a_class_without_a_topic_is_a_base_for_others_and_no_event_itself() -> None:
    class OrderEvent(Event):
        order_id: int

    class Shipped(OrderEvent, topic="orders.shipped", key="order_id"):
        pass

    assert event_type(Shipped).key == "order_id"
    with pytest.raises(
        UsageError, match=r"event class OrderEvent \(.*\.py:\d+\) has no topic; write class OrderEvent\(Event, topic=.* \[OB202: "
    ):
        event_type(OrderEvent)


@pytest.mark.parametrize("other", [int, Line, Placed(order_id=1), "orders.placed", None])
def test_what_is_no_event_class_is_refused(other: Any) -> None:
    with pytest.raises(UsageError, match=r"is not an event class; derive it from orderbus\.Event \[OB201: "):
        event_type(other)


@pytest.mark.parametrize(
    ("hint", "named"),
    [
        (Any, "Any"),
        (object, "object"),
        (dict, "bare dict"),
        (list, "bare list"),
        (set, "bare set"),
        (frozenset, "bare frozenset"),
        (tuple, "bare tuple"),
        (typing.Dict, "bare Dict"),  # noqa: UP006
        (typing.List, "bare List"),  # noqa: UP006
        (typing.Tuple, "bare Tuple"),  # noqa: UP006
        (typing.Sequence, "bare Sequence"),
        (typing.Mapping, "bare Mapping"),
        (collections.abc.Sequence, "bare Sequence"),
        (collections.abc.Iterable, "bare Iterable"),
        (collections.abc.MutableMapping, "bare MutableMapping"),
        (dict | None, "bare dict"),
        (int | list, "bare list"),
        (Annotated[dict, msgspec.Meta(title="x")], "bare dict"),
        (list[Any], "Any"),
        (dict[str, object], "object"),
        (list[dict[str, list[Any]]], "Any"),
        (tuple[int, ...] | tuple[Any, ...], "Any"),
        (T, "unbound type variable"),
        (list[T], "unbound type variable"),
        (Loose, "Any in Loose.anything"),
        (list[Loose], "Any in Loose.anything"),
        (Box, "unbound type variable ~T in Box.content"),
        (Box[Any], "Any"),
        (LooseBox[int], "bare dict in LooseBox.rest"),
        (LooseData, "bare list in LooseData.parts"),
        (LooseDict, "object in LooseDict.parts"),
        (LooseTuple, "Any in LooseTuple.parts"),
        (LooseAttrs, "bare list in LooseAttrs.parts"),
        (LooseSpecial, "Any in LooseSpecial.__parts__"),
        (LooseAlias, "bare dict"),
        ("dict[str, Any]", "Any"),
    ],
)
def test_a_field_that_may_hold_anything_is_refused_and_named(hint: Any, named: str) -> None:
    with pytest.raises(UsageError) as raised:
        event_with(hint)

    assert re.search(rf"event class Made \(.*\.py:\d+\): field 'field' may hold anything \({re.escape(named)}", str(raised.value))
    assert "give it a definite type" in str(raised.value)
    assert raised.value.code == "OB206"


@pytest.mark.parametrize(
    "hint",
    [
        int,
        str,
        bytes,
        UUID,
        Id,
        Colour,
        None,
        int | None,
        Literal["a", 1],
        list[int],
        list[list[str]],
        dict[str, int],
        tuple[int, ...],
        tuple[()],
        collections.abc.Mapping[str, int],
        frozenset[str],
        Line,
        list[Line],
        Node,
        Box[int],
        Box[list[Line]],
        TitledBox[int],
        msgspec.Raw,
        Annotated[str, msgspec.Meta(max_length=5)],
        int | msgspec.UnsetType,
        "list[Line]",
    ],
)
def test_a_field_of_definite_shape_is_accepted(hint: Any) -> None:
    assert event_type(event_with(hint)).topic == "made"


def test_a_class_variable_is_no_field() -> None:
    class Marked(Event, topic="marked"):
        registry: typing.ClassVar[dict] = {}
        untyped: typing.ClassVar = {}

    assert event_type(Marked).topic == "marked"


def test_a_forward_reference_is_looked_at_when_the_class_is_first_used() -> None:
    made = event_with("Later")
    globals()["Later"] = Loose
    try:
        with pytest.raises(UsageError, match=r"Any in Loose\.anything"):
            event_type(made)
    finally:
        del globals()["Later"]


def test_a_subclass_may_not_smuggle_in_what_its_base_could_not() -> None:
    class Wider(Placed):
        extra: Any

    with pytest.raises(UsageError, match=r"event class Wider \(.*\.py:\d+\): field 'extra'"):
        event_type(Wider)


@pytest.mark.parametrize(
    ("value", "key"), [(7, "7"), ("k", "k"), (UUID(int=1), "00000000-0000-0000-0000-000000000001"), (None, None)]
)
def test_the_key_is_the_fields_value_as_text_and_none_has_no_order(value: Any, key: str | None) -> None:
    keyed = event_with(int | str | UUID | None, key="field")

    assert event_key(keyed(field=value)) == key


def test_an_event_without_a_key_field_has_no_key() -> None:
    assert event_key(event_with(int)(field=1)) is None
