"""The byte stream, cut anywhere, gives the same deliveries and leaves the same frames to aiormq."""

from __future__ import annotations

import asyncio
import struct
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st
from pamqp import commands, frame as pamqp_frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from orderbus.adapters.rabbitmq.content import PLACES_KEPT, ConnectionSink, DeliverySink
from orderbus.adapters.rabbitmq.fields import decode_properties
from orderbus.adapters.rabbitmq.frames import BASIC_DELIVER, CHANNEL_CLOSE, HEARTBEAT_FRAME, FrameError, FrameSplitter
from orderbus.adapters.rabbitmq.transport import SplitProtocol
from orderbus.errors import MessageError

CONTENT, OTHER = 3, 1


def marshal(channel: int, *frames: object) -> bytes:
    return b"".join(pamqp_frame.marshal(frame, channel) for frame in frames)  # type: ignore[arg-type]


def delivery(tag: int, *pieces: bytes, redelivered: bool = False) -> bytes:
    return marshal(
        CONTENT,
        commands.Basic.Deliver("c.1", tag, redelivered, "exchange", f"key.{tag}"),
        ContentHeader(0, sum(map(len, pieces)), commands.Basic.Properties(message_id=f"id-{tag}")),
        *map(ContentBody, pieces),
    )


DECLARED = marshal(OTHER, commands.Queue.DeclareOk("q", 1, 0))
QOS_OK = marshal(CONTENT, commands.Basic.QosOk())
BEAT = pamqp_frame.marshal(Heartbeat(), 0)
STREAM = b"".join(
    (DECLARED, delivery(1, b"one"), BEAT, delivery(2), QOS_OK, delivery(3, b"th", b"r", b"ee", redelivered=True), DECLARED)
)
EXPECTED = [(1, b"one", False, "key.1", "id-1"), (2, b"", False, "key.2", "id-2"), (3, b"three", True, "key.3", "id-3")]


class Received:
    def __init__(self, max_body: int = 1000) -> None:
        self.notified = 0
        self.splitter = FrameSplitter()
        self.sink = DeliverySink("q", 1, decode_properties, self.notify, max_body)
        self.splitter.routes[CONTENT] = self.sink

    def notify(self) -> None:
        self.notified += 1

    def feed(self, *chunks: bytes) -> bytes:
        return b"".join(self.splitter.feed(chunk) for chunk in chunks)

    @property
    def summary(self) -> list[tuple[int, bytes, bool, str, str | None]]:
        return [(d.tag, d.body, d.redelivered, d.routing_key, d.properties.message_id) for d in self.sink.arrived]


@pytest.mark.parametrize("at", range(len(STREAM) + 1))
def test_a_cut_changes_nothing(at: int) -> None:
    received = Received()
    assert received.feed(STREAM[:at], STREAM[at:]) == DECLARED + BEAT + QOS_OK + DECLARED
    assert received.summary == EXPECTED
    assert received.notified == 1


def test_byte_by_byte_changes_nothing() -> None:
    received = Received()
    assert received.feed(*(bytes([byte]) for byte in STREAM)) == DECLARED + BEAT + QOS_OK + DECLARED
    assert received.summary == EXPECTED


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_many_cuts_change_nothing(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    received = Received()
    received.feed(*(STREAM[start:end] for start, end in pairwise(edges)))
    assert received.summary == EXPECTED


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_awaited(data: bytes) -> None:
    received = Received()
    try:
        received.feed(data)
    except FrameError:
        return
    assert received.summary == []


@given(st.integers(0, len(STREAM) - 1), st.integers(0, 255))
def test_a_damaged_byte_raises_nothing_but_frame_error(at: int, byte: int) -> None:
    received = Received()
    try:
        received.feed(STREAM[:at] + bytes([byte]) + STREAM[at + 1 :])
    except FrameError:
        return


@pytest.mark.parametrize(
    "frames",
    [
        (ContentHeader(0, 1, commands.Basic.Properties()),),
        (ContentBody(b"x"),),
        (commands.Basic.Deliver("c", 1, False, "", ""), ContentBody(b"x")),
        (commands.Basic.Deliver("c", 1, False, "", ""), commands.Basic.Deliver("c", 2, False, "", "")),
        (commands.Basic.Deliver("c", 1, False, "", ""), ContentHeader(0, 1), ContentBody(b"xx")),
        (commands.Basic.Deliver("c", 1, False, "", ""), ContentHeader(0, 1), ContentHeader(0, 1)),
        (commands.Basic.Deliver("c", 1, False, "", ""), ContentHeader(0, 3), ContentBody(b"x"), ContentBody(b"xxx")),
    ],
)
def test_content_out_of_order_is_refused(frames: tuple[object, ...]) -> None:
    with pytest.raises(FrameError):
        Received().feed(marshal(CONTENT, *frames))


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (1, b""),
        (1, b"\x00\x3c\x00"),
        (1, struct.pack(">I2sQB", BASIC_DELIVER, b"\x01c", 1, 0) + b"\x01x\x09k"),  # a key that reaches into the next frame
        (1, struct.pack(">I2sQB", BASIC_DELIVER, b"\x01c", 1, 0) + b"\x01x\x01key"),
        (1, struct.pack(">IH", CHANNEL_CLOSE, 404) + b"\x09no"),
    ],
)
def test_a_method_that_does_not_end_with_its_frame_is_refused_whatever_follows(kind: int, payload: bytes) -> None:
    frame = struct.pack(">BHI", kind, CONTENT, len(payload)) + payload + b"\xce"
    for following in (b"", QOS_OK, QOS_OK * 20):
        with pytest.raises(FrameError):
            Received().feed(frame + following)


@pytest.mark.parametrize("length", range(14))
def test_a_content_header_that_is_cut_short_is_refused_whatever_follows(length: int) -> None:
    method = marshal(CONTENT, commands.Basic.Deliver("c", 1, False, "", ""))
    header = struct.pack(">BHI", 2, CONTENT, length) + bytes(length) + b"\xce"
    for following in (b"", QOS_OK * 20):
        with pytest.raises(FrameError, match="cut short"):
            Received().feed(method + header + following)


def test_an_empty_piece_of_a_body_is_passed_over() -> None:
    received = Received()
    received.feed(delivery(1, b"", b"on", b"", b"e"), delivery(2, b"two"))
    assert [(d.tag, d.body) for d in received.sink.arrived] == [(1, b"one"), (2, b"two")]


def test_an_answer_that_is_no_amqp_is_refused() -> None:
    with pytest.raises(FrameError, match="announced"):
        FrameSplitter().feed(b"HTTP/1.1 400 Bad Request\r\n")


def test_a_body_beyond_the_cap_is_dropped_alone() -> None:
    received = Received(max_body=4)
    received.feed(delivery(1, b"12", b"345"), delivery(2, b"1234"))
    large, small = received.sink.arrived
    assert large.body == b""
    with pytest.raises(MessageError, match="5 bytes"):
        _ = large.properties
    assert (small.body, small.properties.message_id) == (b"1234", "id-2")


def test_of_ever_new_routing_keys_few_are_remembered() -> None:
    received = Received()
    for tag in range(3 * PLACES_KEPT):
        received.feed(delivery(tag + 1))
        assert len(received.sink._places) <= PLACES_KEPT
    assert [d.routing_key for d in received.sink.arrived] == [f"key.{tag + 1}" for tag in range(3 * PLACES_KEPT)]


def test_a_routing_key_that_is_not_utf8_is_shown_escaped() -> None:
    received = Received()
    received.feed(delivery(1, b"x").replace(b"key.1", b"key\xff1"))
    assert received.sink.arrived[0].routing_key == "key\\xff1"


def test_the_end_of_a_channel_is_seen_by_both() -> None:
    received = Received()
    close = marshal(CONTENT, commands.Channel.Close(406, "PRECONDITION_FAILED - timeout", 0, 0))
    assert received.feed(delivery(1, b"x"), close) == close
    assert received.sink.failure == "the broker closed the channel: PRECONDITION_FAILED - timeout (406)"
    assert CONTENT not in received.splitter.routes


def test_a_cancelled_consumer_is_seen_by_both_and_its_channel_lives() -> None:
    received = Received()
    cancel = marshal(CONTENT, commands.Basic.Cancel("c.1", True))
    assert received.feed(cancel) == cancel
    assert received.sink.cancelled is not None
    assert received.sink.failure is None
    assert CONTENT in received.splitter.routes


@pytest.mark.anyio
async def test_content_alone_keeps_aiormq_s_clock_of_liveness_going() -> None:
    splitter, reader = FrameSplitter(), asyncio.StreamReader()
    splitter.routes[CONTENT] = DeliverySink("q", 1, decode_properties, lambda: None, 1 << 20)
    protocol = SplitProtocol(reader, splitter, lambda reason: None)
    protocol.is_ready = True
    now = protocol._fed_at
    protocol._now = lambda: now
    content = delivery(1, b"x" * 100)
    protocol.data_received(content)
    now += 2
    protocol.data_received(content[:50])  # the cut is ours: what aiormq reads are whole frames
    protocol.data_received(content[50:])
    assert await reader.readexactly(8) == HEARTBEAT_FRAME
    protocol.data_received(DECLARED)
    assert await reader.readexactly(len(DECLARED)) == DECLARED


def test_channel_zero_is_overheard() -> None:
    heard: list[str | None] = []
    splitter = FrameSplitter()
    splitter.routes[0] = ConnectionSink(heard.append, heard.append)
    frames = marshal(
        0,
        commands.Connection.Blocked("low on memory"),
        commands.Connection.Unblocked(),
        commands.Connection.Close(320, "bye", 0, 0),
    )
    assert splitter.feed(frames + BEAT) == frames + BEAT
    assert heard == ["low on memory", None, "the broker closed the connection: bye (320)"]
