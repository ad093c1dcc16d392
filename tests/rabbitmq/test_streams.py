"""Whole streams of several channels, cut anywhere: what comes of them is what pamqp and a plain model say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pamqp.frame
import pytest
from hypothesis import given, settings, strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from orderbus._core.message import Outgoing, Receipt, Settlement
from orderbus.adapters.rabbitmq.confirms import Confirms, SentBatch
from orderbus.adapters.rabbitmq.content import ConfirmSink, ConnectionSink, DeliverySink
from orderbus.adapters.rabbitmq.encoder import PublishEncoder
from orderbus.adapters.rabbitmq.fields import SEQUENCE, decode_properties
from orderbus.adapters.rabbitmq.frames import FrameError, FrameSplitter, ack, nack_requeue, reject
from orderbus.adapters.rabbitmq.settlements import Settlements

CONSUMING, PUBLISHING, PLAIN = (3, 4), 5, 6
PUBLISHED = 6
SHORT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
EXCHANGE = st.text("ab09-_.:@#,/+ ", max_size=20)  # pamqp makes no other


def marshal(channel: int, *frames: Any) -> list[bytes]:
    return [pamqp.frame.marshal(frame, channel) for frame in frames]


@dataclass
class Outcome:
    """What a stream leads to."""

    deliveries: list[tuple[int, int, bool, str, str, str | None, bytes]] = field(default_factory=list)
    receipts: list[Receipt | None] = field(default_factory=lambda: [None] * PUBLISHED)
    blocked: list[str | None] = field(default_factory=list)
    passed_on: bytes = b""


class Ours:
    def __init__(self) -> None:
        self.splitter = FrameSplitter()
        self.blocked: list[str | None] = []
        self.splitter.routes[0] = ConnectionSink(self.blocked.append, self.blocked.append)
        self.sinks = {number: DeliverySink("q", 1, decode_properties, lambda: None, 1 << 20) for number in CONSUMING}
        self.splitter.routes.update(self.sinks)
        confirms = Confirms()
        self.batches: list[SentBatch] = []
        for _ in range(PUBLISHED // 2):
            batch = confirms.begin(lambda: None)
            confirms.sent(batch, 2)
            confirms.finish(batch)
            self.batches.append(batch)
        self.splitter.routes[PUBLISHING] = ConfirmSink(confirms)

    def outcome(self, pieces: Iterable[bytes]) -> Outcome:
        passed_on = b"".join(self.splitter.feed(piece) for piece in pieces)
        deliveries = [
            (number, d.tag, d.redelivered, d.exchange, d.routing_key, d.properties.message_id, d.body)
            for number, sink in self.sinks.items()
            for d in sink.arrived
        ]
        receipts = [receipt for batch in self.batches for receipt in batch.receipts]
        return Outcome(deliveries, receipts, self.blocked, passed_on)


def as_pamqp_reads(stream: bytes) -> Outcome:
    """The plainest reading: frame by frame, everything at hand."""
    outcome = Outcome()
    deliveries: dict[int, list[Any]] = {number: [] for number in CONSUMING}
    open_content: dict[int, list[Any]] = {}
    returned: set[int] = set()
    while stream:
        used, channel, frame = pamqp.frame.unmarshal(stream)
        data, stream = stream[:used], stream[used:]
        if channel in (0, PLAIN) or isinstance(frame, commands.Basic.QosOk):
            outcome.passed_on += data
            if isinstance(frame, commands.Connection.Blocked):
                outcome.blocked.append(frame.reason)
            elif isinstance(frame, commands.Connection.Unblocked):
                outcome.blocked.append(None)
            continue
        if isinstance(frame, commands.Basic.Ack | commands.Basic.Nack):
            answer = Receipt.CONFIRMED if isinstance(frame, commands.Basic.Ack) else Receipt.REFUSED
            for number in range(1 if frame.multiple else frame.delivery_tag, frame.delivery_tag + 1):
                if outcome.receipts[number - 1] is None:
                    outcome.receipts[number - 1] = Receipt.UNROUTABLE if number in returned else answer
            continue
        if isinstance(frame, commands.Basic.Deliver | commands.Basic.Return):
            open_content[channel] = [frame, None, b""]
        elif isinstance(frame, ContentHeader):
            open_content[channel][1] = frame
        else:
            assert isinstance(frame, ContentBody)
            open_content[channel][2] += frame.value
        method, header, body = open_content[channel]
        if header is None or len(body) < header.body_size:
            continue
        del open_content[channel]
        if channel == PUBLISHING:
            returned.add(header.properties.headers[SEQUENCE])
        else:
            deliveries[channel].append(
                (
                    channel,
                    method.delivery_tag,
                    method.redelivered,
                    method.exchange,
                    method.routing_key,
                    header.properties.message_id,
                    body,
                )
            )
    outcome.deliveries = [delivery for of_channel in deliveries.values() for delivery in of_channel]
    return outcome


def pieces_of(body: bytes, count: int) -> list[ContentBody]:
    edges = [len(body) * index // count for index in range(count + 1)]
    return [ContentBody(body[start:end]) for start, end in pairwise(edges) if end > start]  # pamqp reads no empty one


@st.composite
def delivery_frames(draw: st.DrawFn, channel: int, tag: int) -> list[bytes]:
    body = draw(st.binary(max_size=30))
    properties = commands.Basic.Properties(message_id=draw(SHORT.filter(bool)), headers={"n": draw(SHORT)})
    return marshal(
        channel,
        commands.Basic.Deliver("c", tag, draw(st.booleans()), draw(EXCHANGE), draw(SHORT)),
        ContentHeader(0, len(body), properties),
        *pieces_of(body, draw(st.integers(1, 3))),
    )


@st.composite
def answer_frames(draw: st.DrawFn) -> list[bytes]:
    """As a broker answers: a return comes before the answer to the same message, and nothing is answered twice."""
    frames: list[bytes] = []
    answered = 0
    while answered < PUBLISHED and draw(st.booleans()):
        upto = draw(st.integers(answered + 1, PUBLISHED))
        for number in range(answered + 1, upto + 1):
            if draw(st.booleans()):
                frames += return_frames(number, draw(st.binary(max_size=20)), draw(st.integers(1, 3)))
        numbers = [upto] if draw(st.booleans()) else draw(st.permutations(range(answered + 1, upto + 1)))
        kind = draw(st.sampled_from([commands.Basic.Ack, commands.Basic.Nack]))
        frames += marshal(PUBLISHING, *(kind(number, multiple=len(numbers) == 1) for number in numbers))
        answered = upto
    return frames


def return_frames(number: int, body: bytes, count: int) -> list[bytes]:
    properties = commands.Basic.Properties(message_id="same", headers={SEQUENCE: number})
    return marshal(
        PUBLISHING,
        commands.Basic.Return(312, "NO_ROUTE", "x", "k"),
        ContentHeader(0, len(body), properties),
        *pieces_of(body, count),
    )


CONTROL = [
    marshal(0, Heartbeat()),
    marshal(0, commands.Connection.Blocked("low on memory")),
    marshal(0, commands.Connection.Unblocked()),
    marshal(PLAIN, commands.Queue.DeclareOk("q", 1, 0)),
    marshal(CONSUMING[0], commands.Basic.QosOk()),
    marshal(PLAIN, commands.Basic.GetOk(1, False, "x", "k", 0), ContentHeader(0, 2), ContentBody(b"ab")),
]


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Frames of each channel in their order, the channels interleaved at will."""
    lanes: list[list[list[bytes]]] = [
        [draw(delivery_frames(number, tag)) for tag in range(1, draw(st.integers(1, 4)))] for number in CONSUMING
    ]
    lanes.append([draw(answer_frames())])
    lanes.append(draw(st.lists(st.sampled_from(CONTROL), max_size=4)))
    # A method on a channel waits for the end of the content before it, so a lane's groups stay whole on their channel.
    queues = [[frame for group in lane for frame in group] for lane in lanes]
    if any(frame in CONTROL[4] for frame in queues[-1]):
        queues[0] += [frame for frame in queues[-1] if frame in CONTROL[4]]
        queues[-1] = [frame for frame in queues[-1] if frame not in CONTROL[4]]
    stream = b""
    while queues := [queue for queue in queues if queue]:
        stream += draw(st.sampled_from(queues)).pop(0)
    return stream


@settings(max_examples=40)
@given(streams())
def test_a_stream_leads_to_the_same_wherever_it_is_cut(stream: bytes) -> None:
    expected = as_pamqp_reads(stream)
    assert Ours().outcome([stream]) == expected
    for at in range(1, len(stream)):
        assert Ours().outcome([stream[:at], stream[at:]]) == expected
    assert Ours().outcome(bytes([byte]) for byte in stream) == expected


@settings(max_examples=200)
@given(streams(), st.lists(st.integers(0, 2000), max_size=20))
def test_a_stream_leads_to_the_same_in_any_number_of_pieces(stream: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert Ours().outcome(stream[start:end] for start, end in pairwise(edges)) == as_pamqp_reads(stream)


# Returns and confirms


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (return_frames(PUBLISHED + 1, b"", 1), "waits for no answer"),
        (marshal(PUBLISHING, commands.Basic.Ack(1)) + return_frames(1, b"", 1), "waits for no answer"),
        (return_frames(1, b"x", 1)[:1] * 2, "inside another"),
        (return_frames(1, b"xy", 1)[:2] + marshal(PUBLISHING, ContentBody(b"xyz")), "longer than announced"),
        (return_frames(1, b"xy", 1)[:2] * 2, "inside another"),
        (return_frames(1, b"x", 1)[1:], "outside of a returned message"),
        (return_frames(1, b"x", 1)[2:], "outside of a returned message"),
        (
            marshal(PUBLISHING, commands.Basic.Return(312, "", "", ""), ContentHeader(0, 0, commands.Basic.Properties())),
            f"no {SEQUENCE}",
        ),
        ([b"\x01\x00\x05\x00\x00\x00\x0c\x00\x3c\x00\x50" + bytes(8) + b"\xce"], "wrong length"),
        ([b"\x01\x00\x05\x00\x00\x00\x0e\x00\x3c\x00\x78" + bytes(10) + b"\xce"], "wrong length"),
        ([*return_frames(1, b"", 1)[:1], b"\x02\x00\x05\x00\x00\x00\x0d\x00\x3c" + bytes(11) + b"\xce"], "cut short"),
    ],
)
def test_answers_that_no_broker_gives_are_refused(frames: list[bytes], words: str) -> None:
    with pytest.raises(FrameError, match=words):
        Ours().outcome(frames)


def test_channel_zero_refuses_a_text_longer_than_its_frame() -> None:
    blocked = marshal(0, commands.Connection.Blocked("low"))[0]
    for damaged in (blocked.replace(b"\x03low", b"\x09low"), b"\x01\x00\x00\x00\x00\x00\x02\x00\x0a\xce"):
        for following in (b"", blocked * 10):
            with pytest.raises(FrameError):
                Ours().outcome([damaged + following])


# What we send, read by pamqp


@given(st.integers(1, 65535), st.integers(1, 2**63 - 1), st.booleans())
def test_our_settlement_frames_are_those_of_pamqp(channel: int, tag: int, multiple: bool) -> None:
    assert [ack(channel, tag, multiple=multiple)] == marshal(channel, commands.Basic.Ack(tag, multiple))
    assert [nack_requeue(channel, tag)] == marshal(channel, commands.Basic.Nack(tag, multiple=False, requeue=True))
    assert [reject(channel, tag, requeue=multiple)] == marshal(channel, commands.Basic.Reject(tag, requeue=multiple))


@given(st.lists(st.sampled_from(Settlement), min_size=1, max_size=20), st.integers(1, 65535))
def test_pamqp_reads_settlements_in_the_order_that_gives_back_before_it_acks_all(hows: list[Settlement], channel: int) -> None:
    settlements = Settlements(channel)
    for tag, how in enumerate(hows, 1):
        settlements.add(tag, how)
    data, left = settlements.take(), dict.fromkeys(Settlement, 0)
    open_tags = set(range(1, len(hows) + 1))
    while data:
        used, number, frame = pamqp.frame.unmarshal(data)
        data = data[used:]
        assert number == channel
        assert isinstance(frame, commands.Basic.Ack | commands.Basic.Nack | commands.Basic.Reject)
        match frame:
            case commands.Basic.Ack():
                how = Settlement.ACK
            case commands.Basic.Nack():
                how = Settlement.RELEASE
            case _:
                how = Settlement.REJECT if frame.requeue else Settlement.DEAD_LETTER
        last = frame.delivery_tag
        assert last is not None
        tags = {tag for tag in open_tags if tag <= last} if getattr(frame, "multiple", False) else {last}
        assert all(hows[tag - 1] is how for tag in tags)
        left[how] += len(tags)
        open_tags -= tags
    assert not open_tags
    assert left == {how: hows.count(how) for how in Settlement}


@given(st.binary(max_size=300), EXCHANGE, SHORT, st.integers(4, 120))
def test_our_publishes_arrive_as_deliveries_of_the_same_content(body: bytes, exchange: str, key: str, piece: int) -> None:
    """A broker that passes our content frames on as they are."""
    frames = PublishEncoder(CONSUMING[0], piece + 8).encode(Outgoing(exchange, key, body, "id", "t"), 1)
    used, _, _ = pamqp.frame.unmarshal(frames)
    deliver = marshal(CONSUMING[0], commands.Basic.Deliver("c", 9, False, exchange, key))[0]
    outcome = Ours().outcome([deliver + frames[used:]])
    assert outcome.deliveries == [(CONSUMING[0], 9, False, exchange, key, "id", body)]
