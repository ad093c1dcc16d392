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

    with pytest.raises(UsageError, match=r"Licensed\.plate: no text can be made up for the pattern"):
        samples_of(Licensed)
    with pytest.raises(UsageError, match="Choosy refuses what was made up for its fields: n is small"):
        samples_of(Choosy)


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
