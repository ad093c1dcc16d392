"""Sample messages of a class: all of its cases, and what a later class makes of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import msgspec
import pytest
from msgspec import Meta

from orderbus import Event, UsageError
from orderbus._core.event import EventMeta
from orderbus._core.samples import Sample, difference, missing_fields, samples_of, unread_fields


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(NamedTuple):
    x: int
    y: float


@dataclass
class Size:
    width: int


class Card(msgspec.Struct, tag="card"):
    digits: str


class Cash(msgspec.Struct, tag="cash"):
    pass


class Tree(msgspec.Struct):
    name: str
    branches: list[Tree] = []


class SameLine(msgspec.Struct):
    sku: str
    pieces: int
    is_gift: bool = False


class OtherLine(msgspec.Struct):
    sku: str
    count: int = 1


class Everything(Event, topic="samples.everything", key="n"):
    n: int
    share: float
    text: str
    is_new: bool
    colour: Colour
    kind: Literal["a", "b", "c"]
    paid_by: Card | Cash
    tree: Tree
    point: Point
    size: Size
    id: UUID
    at: datetime
    day: date
    hour: time
    lasts: timedelta
    price: Decimal
    picture: bytes
    extra: msgspec.Raw
    tags: set[str]
    pairs: tuple[int, str]
    names: dict[str, int]
    few: Annotated[list[int], Meta(min_length=2, max_length=3)]
    percent: Annotated[int, Meta(ge=0, le=100)]
    step: Annotated[int, Meta(multiple_of=25, gt=0)]
    code: Annotated[str, Meta(min_length=2, max_length=5)]
    currency: Annotated[str, Meta(pattern="^[A-Z]{3}$")]
    due: Annotated[datetime, Meta(tz=False)]
    note: str | None = None


def bodies(cls: type[Event]) -> list[dict[str, Any]]:
    return [msgspec.json.decode(sample.body) for sample in samples_of(cls)]


def test_all_cases_of_a_field_are_in_some_sample() -> None:
    made = bodies(Everything)

    def values(name: str) -> set[Any]:
        return {msgspec.json.encode(body[name]).decode() for body in made}

    assert values("is_new") == {"true", "false"}
    assert values("colour") == {'"red"', '"blue"'}
    assert values("kind") == {'"a"', '"b"', '"c"'}
    assert values("paid_by") == {'{"type":"card","digits":"text"}', '{"type":"cash"}'}
    assert values("note") == {"null", '"text"'}
    assert values("percent") == {"0", "100"}
    assert values("step") == {"25"}
    assert values("code") == {'"te"', '"text "'}
    assert values("currency") == {'"EUR"'}
    assert values("few") == {"[7,7]"}
    assert values("tags") == {"[]", '["text"]'}


def test_they_are_the_same_each_time_and_their_class_reads_them() -> None:
    assert samples_of(Everything) == samples_of(Everything)
    assert [difference(Everything, sample) for sample in samples_of(Everything)] == [None] * len(samples_of(Everything))
    assert not any(unread_fields(Everything, sample) for sample in samples_of(Everything))
    assert missing_fields(Everything, samples_of(Everything)) == []


def test_what_can_not_be_made_up_is_named() -> None:
    class Licensed(Event, topic="samples.licensed"):
        plate: Annotated[str, Meta(pattern=r"^\d{9}[QX]$")]

    class Choosy(Event, topic="samples.choosy"):
        n: int

        def __post_init__(self) -> None:
            if self.n < 1000:
                raise ValueError("n is small")

    for cls, said in (
        (Licensed, r"Licensed\.plate: no text can be made up for the pattern"),
        (Choosy, "Choosy refuses what was made up for its fields: n is small"),
    ):
        with pytest.raises(UsageError, match=said) as raised:
            samples_of(cls)
        assert raised.value.code == "OB620"


class Complex:
    pass


@dataclass
class WithComplex:
    inner: Complex


@dataclass
class Folder:
    folders: dict[str, Folder]


class Node(msgspec.Struct):
    left: Node | None = None


class Leaf(msgspec.Struct):
    pass


def cases_of(hint: Any) -> list[Any]:
    """What the samples of a class have in a field of this type, each once, in order."""
    made = bodies(EventMeta("Made", (Event,), {"__annotations__": {"field": hint}, "__module__": __name__}, topic="samples.made"))
    return list({msgspec.json.encode(body["field"]): body["field"] for body in made}.values())


@pytest.mark.parametrize(
    ("hint", "cases"),
    [
        (int, [7]),
        (float, [7.5]),
        (Annotated[int, Meta(gt=1)], [2]),
        (Annotated[int, Meta(lt=1)], [0]),
        (Annotated[int, Meta(gt=1, lt=5)], [2, 4]),
        (Annotated[int, Meta(ge=1, le=1)], [1]),
        (Annotated[int, Meta(ge=10, le=99, multiple_of=25)], [25, 75]),
        (Annotated[int, Meta(multiple_of=4)], [4]),
        (Annotated[float, Meta(gt=1, lt=5)], [1.5, 4.5]),
        (Annotated[float, Meta(ge=1.0, le=2.0)], [1.0, 2.0]),
        (Annotated[float, Meta(multiple_of=0.25)], [0.25]),
    ],
)
def test_a_number_is_tried_at_each_of_its_bounds_or_is_a_plain_one(hint: Any, cases: list[Any]) -> None:
    assert cases_of(hint) == cases


@pytest.mark.parametrize(
    ("hint", "lengths"),
    [
        (Annotated[str, Meta(max_length=3)], [1, 3]),
        (Annotated[str, Meta(max_length=0)], [0]),
        (Annotated[str, Meta(min_length=2)], [2, 64]),
        (Annotated[str, Meta(min_length=0)], [1, 64]),
        (Annotated[str, Meta(min_length=100)], [100]),
        (Annotated[str, Meta(min_length=5_000)], [5_000]),
        (Annotated[str, Meta(max_length=10_000)], [1, 4096]),
        (Annotated[str, Meta(pattern="^A$", min_length=1, max_length=1)], [1]),
        (Annotated[str, Meta(pattern="[a-z]")], [4]),
        (Annotated[str, Meta(pattern="^$|[a-z]", max_length=0)], [0]),
    ],
)
def test_a_text_is_tried_at_each_of_its_lengths(hint: Any, lengths: list[int]) -> None:
    assert [len(text) for text in cases_of(hint)] == lengths


@pytest.mark.parametrize(
    ("hint", "cases"),
    [
        (bool, [True, False]),
        (bool | None, [True, False, None]),
        (None, [None]),
        (bytes, ["Ynl0ZXM="]),
        (datetime, ["2025-01-31T12:30:00Z"]),
        (Annotated[datetime, Meta(tz=False)], ["2025-01-31T12:30:00"]),
        (time, ["12:30:00Z"]),
        (Annotated[time, Meta(tz=False)], ["12:30:00"]),
        (dict[str, bool], [{"text": True}, {"text": False}, {}]),
        (Annotated[dict[str, int], Meta(min_length=1)], [{"text": 7}]),
        (list[bool], [[True, False], []]),
        (Annotated[list[bool], Meta(max_length=1)], [[True], []]),
        (Annotated[list[int], Meta(max_length=0)], [[]]),
        (Annotated[list[int], Meta(min_length=3)], [[7, 7, 7]]),
        (tuple[int, bool], [[7, True]]),
        (tuple[int, Leaf], [[7, {}]]),
        (list[Leaf], [[{}], []]),
    ],
)
def test_a_field_is_tried_with_each_of_its_cases(hint: Any, cases: list[Any]) -> None:
    assert cases_of(hint) == cases


def test_a_class_without_fields_has_one_sample() -> None:
    class Empty(Event, topic="samples.empty"):
        pass

    assert bodies(Empty) == [{}]


def test_a_class_that_holds_itself_is_filled_in_four_structs_deep() -> None:
    class Rooted(Event, topic="samples.rooted"):
        tree: Tree

    deep = bodies(Rooted)[0]["tree"]
    names = 0
    while deep["branches"]:
        deep, names = deep["branches"][0], names + 1
    assert names == 3
    with pytest.raises(UsageError, match=r"^Made\.field\.left\.left\.left\.left: no sample of Struct can be made up \[OB620: "):
        cases_of(Node)


@pytest.mark.parametrize(
    "hint",
    [
        list[Complex],
        dict[str, Complex],
        dict[Complex, int],
        tuple[int, Complex],
        Complex | None,
        Complex,
    ],
)
def test_what_can_not_be_made_up_is_named_wherever_it_stands(hint: Any) -> None:
    with pytest.raises(UsageError, match=r"^Made\.field: no sample of Custom can be made up \[OB620: ") as raised:
        cases_of(hint)

    assert raised.value.code == "OB620"


def test_what_can_not_be_made_up_in_a_dataclass_is_named_with_its_field() -> None:
    with pytest.raises(UsageError, match=r"^Made\.field\.inner: no sample of Custom can be made up"):
        cases_of(WithComplex)


def test_a_dataclass_that_holds_itself_in_a_dict_is_filled_in_as_deep_and_ends_with_an_empty_dict() -> None:
    innermost: dict[str, Any] = {"folders": {}}
    third = {"folders": {"text": innermost}}
    assert cases_of(Folder) == [{"folders": {"text": {"folders": {"text": third}}}}]


OLD = Sample(msgspec.Raw(b'{"order_id":7,"lines":[{"sku":"tea","pieces":2}],"method":"card"}'), key="7")


def test_a_class_that_still_reads_them_differs_in_nothing() -> None:
    class Placed(Event, topic="samples.placed", key="order_id"):
        order_id: int
        lines: list[SameLine]
        method: str
        note: str | None = None

    assert difference(Placed, OLD) is None
    assert unread_fields(Placed, OLD) == frozenset()
    assert missing_fields(Placed, [OLD]) == ["note"]


def test_each_change_that_old_messages_would_not_survive_is_named_with_its_field() -> None:
    class Renamed(Event, topic="samples.renamed", key="order_id"):
        order_id: int
        lines: list[OtherLine]
        payment: str = "card"

    class Required(Event, topic="samples.required", key="order_id"):
        order_id: int
        cents: int

    class Narrowed(Event, topic="samples.narrowed", key="order_id"):
        order_id: int
        method: Literal["invoice"]

    class Retyped(Event, topic="samples.retyped", key="order_id"):
        order_id: UUID

    class Rekeyed(Event, topic="samples.rekeyed", key="method"):
        method: str

    assert unread_fields(Renamed, OLD) == {"$.lines[0].pieces", "$.method"}
    for cls, said in (
        (Required, "missing required field `cents`"),
        (Narrowed, "Invalid enum value 'card' - at `$.method`"),
        (Retyped, "Expected `uuid`, got `int` - at `$.order_id`"),
        (Rekeyed, "its key is 'card' now, by method, and was '7'"),
    ):
        assert said in str(difference(cls, OLD))


def test_the_fields_of_a_class_that_is_sent_as_an_array_are_its_places() -> None:
    class Placed(Event, topic="samples.array", array_like=True):
        order_id: int
        lines: list[SameLine]
        note: str | None = None

    class Shorter(Event, topic="samples.shorter", array_like=True, tag="placed"):
        order_id: int

    made = samples_of(Placed)
    assert missing_fields(Placed, made) == []
    assert missing_fields(Placed, [Sample(msgspec.Raw(b"[7, []]"))]) == ["note"]
    assert unread_fields(Placed, made[0]) == frozenset()
    assert missing_fields(Shorter, samples_of(Shorter)) == []
    assert unread_fields(Shorter, Sample(msgspec.Raw(b'["placed", 7, []]'))) == {"$[1]"}


def test_a_class_that_has_lost_its_key_is_told_so() -> None:
    class Keyless(Event, topic="samples.keyless"):
        order_id: int

    assert "its key is None now, by no field, and was '7'" in str(difference(Keyless, OLD))


def test_a_field_is_missing_where_no_sample_has_it() -> None:
    class Placed(Event, topic="samples.several", rename="camel"):
        order_id: int
        gift_note: str = ""
        paid_at: str = ""

    made = [Sample(msgspec.Raw(body)) for body in (b'{"orderId":7,"paidAt":"x"}', b'{"orderId":8}')]
    assert missing_fields(Placed, made) == ["giftNote"]


def test_what_is_unread_is_found_wherever_it_stands() -> None:
    class Placed(Event, topic="samples.nested", array_like=True):
        lines: list[SameLine]
        by_sku: dict[str, SameLine]
        pair: tuple[int, SameLine]

    line = '{"sku":"a","pieces":1,"extra":2}'
    body = f'[[{line}],{{"a":{line},"b":{{"sku":"b","pieces":1}}}},[1,{line}],3]'.encode()
    assert unread_fields(Placed, Sample(msgspec.Raw(body))) == {
        "$.lines[0].extra",
        "$.by_sku.a.extra",
        "$.pair[1].extra",
        "$[3]",
    }
