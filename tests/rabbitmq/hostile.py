"""What a broker may send, and what only a hostile or broken one sends: streams, damages to them, and bombs.

Everything is drawn from a `random.Random`, so a seed names a stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from random import Random
from typing import NamedTuple

from orderbus.adapters.rabbitmq.fields import LAST_TIMESTAMP_S
from orderbus.adapters.rabbitmq.frames import (
    BASIC_ACK,
    BASIC_CANCEL,
    BASIC_DELIVER,
    BASIC_NACK,
    BASIC_RETURN,
    BODY,
    CHANNEL_CLOSE,
    CHANNEL_CLOSE_OK,
    CONNECTION_BLOCKED,
    CONNECTION_CLOSE,
    CONNECTION_UNBLOCKED,
    HEADER,
    HEARTBEAT_FRAME,
    MAX_FRAME,
    METHOD,
)

CONSUMING = range(1, 5)
PUBLISHING = 5
PLAIN = 6
PUBLISHED = 40
"""So many publishes wait for an answer on the publishing channel."""
MAX_BODY = 256
"""The cap on the consuming channels: small, so that it is met often."""

KINDS = b"tbBsuIilLfdDSATFVx"
FULL_SIZE = 1 << 62


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def method(channel: int, number: int, arguments: bytes = b"") -> bytes:
    return frame(METHOD, channel, struct.pack(">I", number) + arguments)


def header(channel: int, size: int, properties: bytes = b"\x00\x00") -> bytes:
    return frame(HEADER, channel, struct.pack(">HHQ", 60, 0, size) + properties)


def deliver(channel: int, tag: int, exchange: bytes = b"\x01x", key: bytes = b"\x01k", redelivered: int = 0) -> bytes:
    return method(channel, BASIC_DELIVER, b"\x03c.1" + struct.pack(">QB", tag, redelivered) + exchange + key)


def length_and(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def headers_only(entries: bytes) -> bytes:
    return struct.pack(">H", 1 << 13) + length_and(entries)


def numbered(sequence: int) -> bytes:
    return headers_only(b"\x06ob-seql" + struct.pack(">q", sequence))


# A valid stream


class Stream(NamedTuple):
    frames: list[bytes]
    deliveries: int
    """How many of its messages are whole."""


def valid_stream(random: Random) -> Stream:
    """Frames of each channel in their order, the channels interleaved."""
    lanes = [_deliveries(random, channel) for channel in CONSUMING[: random.randint(1, len(CONSUMING))]]
    deliveries = sum(count for _, count in lanes)
    queues = [frames for frames, _ in lanes] + [_answers(random), _control(random)]
    frames: list[bytes] = []
    while queues := [queue for queue in queues if queue]:
        frames.append(random.choice(queues).pop(0))
    return Stream(frames, deliveries)


def _deliveries(random: Random, channel: int) -> tuple[list[bytes], int]:
    frames: list[bytes] = []
    count = random.choice((0, 1, 1, 2, 3, 8))
    for tag in range(1, count + 1):
        size = random.choice((0, 1, 7, 60, MAX_BODY, MAX_BODY + 1, 500))
        frames.append(deliver(channel, tag, short(random), short(random), random.randint(0, 1)))
        frames.append(header(channel, size, properties(random)))
        frames += [frame(BODY, channel, piece) for piece in pieces(random, random.randbytes(size))]
    ends = (method(channel, BASIC_CANCEL, b"\x03c.1\x01"), method(channel, CHANNEL_CLOSE_OK), _close(channel, CHANNEL_CLOSE))
    if random.random() < 0.1:
        frames.append(random.choice(ends))
    return frames, count


def _answers(random: Random) -> list[bytes]:
    frames: list[bytes] = []
    answered = 0
    while answered < PUBLISHED and random.random() < 0.6:
        upto = random.randint(answered + 1, min(answered + 10, PUBLISHED))
        for number in range(answered + 1, upto + 1):
            if random.random() < 0.2:
                frames += returned(number, random.choice((0, 1, 50)), random)
        frames.append(method(PUBLISHING, random.choice((BASIC_ACK, BASIC_NACK)), struct.pack(">QB", upto, 1)))
        answered = upto
    return frames


def returned(number: int, size: int, random: Random) -> list[bytes]:
    return [
        method(PUBLISHING, BASIC_RETURN, b"\x01\x38" + b"\x08NO_ROUTE" + b"\x01x\x01k"),
        header(PUBLISHING, size, numbered(number)),
        *(frame(BODY, PUBLISHING, piece) for piece in pieces(random, bytes(size))),
    ]


def _control(random: Random) -> list[bytes]:
    choices = [
        HEARTBEAT_FRAME,
        method(0, CONNECTION_BLOCKED, b"\x03low"),
        method(0, CONNECTION_UNBLOCKED),
        method(PLAIN, 50 << 16 | 11, b"\x01q" + bytes(8)),
        deliver(PLAIN, 1),
        header(PLAIN, 2),
        frame(BODY, PLAIN, b"ab"),
    ]
    frames = random.choices(choices, k=random.randint(0, 4))
    return frames + [_close(0, CONNECTION_CLOSE)] * (random.random() < 0.05)


def _close(channel: int, number: int) -> bytes:
    return method(channel, number, struct.pack(">H", 406) + b"\x05stale" + bytes(4))


def pieces(random: Random, body: bytes) -> list[bytes]:
    """Most bodies come in one piece; some in many, empty ones among them, though never as the last."""
    if not body:
        return []
    cuts = sorted(random.randrange(len(body)) for _ in range(random.choice((0, 0, 1, 3, 20))))
    return [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]


def short(random: Random) -> bytes:
    text = _text(random)[:255]
    return bytes([len(text)]) + text


def _text(random: Random) -> bytes:
    return random.choice(("", "x", "orders.placed", "é" * random.randint(0, 40), "€𝄞", "x" * random.randint(0, 300))).encode()


def properties(random: Random) -> bytes:
    """Any choice of all of them."""
    flags, parts = 0, []
    writers: dict[int, Callable[[], bytes]] = {
        13: lambda: length_and(table(random, random.choice((0, 1, 3, 8)), 1)),
        12: lambda: random.choice((b"\x01", b"\x02")),
        11: lambda: random.randbytes(1),
        6: lambda: struct.pack(">Q", random.choice((0, 1_700_000_000, LAST_TIMESTAMP_S))),
    }
    for bit in range(15, 1, -1):
        if random.random() < 0.5:
            flags |= 1 << bit
            parts.append(writers.get(bit, lambda: _whole_short(random))())
    return struct.pack(">H", flags) + b"".join(parts)


def _whole_short(random: Random) -> bytes:
    """A short string that was not cut inside a character."""
    return random.choice(
        (b"\x00", b"\x01x", b"\x02\xc3\xa9", bytes([255]) + b"x" * 255, b"\x24" + random.randbytes(18).hex().encode())
    )


def table(random: Random, entries: int, depth: int) -> bytes:
    return b"".join(_name(number) + field(random, depth) for number in range(entries))


def _name(number: int) -> bytes:
    name = (b"n", b"x-delivery-count", b"ob-key", b"\xc3\xa9")[number % 4] + str(number).encode()
    return bytes([len(name)]) + name


def field(random: Random, depth: int) -> bytes:
    """Any type, with its extremes; a table or an array only where it may still be nested."""
    kind = random.choice(KINDS if depth < 8 else KINDS.replace(b"A", b"").replace(b"F", b""))
    match chr(kind):
        case "S":
            data = length_and(random.choice((_text(random), random.randbytes(random.randint(0, 40)))))
        case "x":
            data = length_and(random.randbytes(random.randint(0, 40)))
        case "F":
            data = length_and(table(random, random.randint(0, 3), depth + 1))
        case "A":
            data = length_and(b"".join(field(random, depth + 1) for _ in range(random.randint(0, 3))))
        case "V":
            data = b""
        case "f":
            data = struct.pack(">f", random.uniform(-1e30, 1e30))
        case "d":
            data = struct.pack(">d", random.choice((0.0, -0.0, 5e-324, 1.7e308, random.gauss(0, 1))))
        case "T":
            data = struct.pack(">Q", random.getrandbits(63))
        case _:
            data = random.randbytes({"t": 1, "b": 1, "B": 1, "s": 2, "u": 2, "I": 4, "i": 4, "l": 8, "L": 8, "D": 5}[chr(kind)])
    return bytes([kind]) + data


# Damage


def damaged(random: Random, frames: list[bytes]) -> bytes:
    """One to four things wrong with it."""
    frames = list(frames)
    for _ in range(random.choice((0, 0, 1, 2))):
        _disorder(random, frames)
    stream = bytearray(b"".join(frames))
    starts = _starts(frames)
    for _ in range(random.choice((1, 1, 2, 4))):
        if stream:
            _spoil(random, stream, starts)
    return bytes(stream)


def _disorder(random: Random, frames: list[bytes]) -> None:
    if not frames:
        return
    at, other = random.randrange(len(frames)), random.randrange(len(frames))
    match random.randrange(5):
        case 0:
            del frames[at]
        case 1:
            frames.insert(other, frames[at])
        case 2:
            frames[at], frames[other] = frames[other], frames[at]
        case 3:
            frames[at] = frames[at][:1] + struct.pack(">H", random.randrange(8)) + frames[at][3:]  # another channel
        case 4:
            frames.insert(at, frame(random.choice((1, 2, 3, 8, 4)), random.randrange(8), random.randbytes(random.randint(0, 60))))


def _starts(frames: list[bytes]) -> list[int]:
    starts, at = [], 0
    for one in frames:
        starts.append(at)
        at += len(one)
    return starts


def _spoil(random: Random, stream: bytearray, starts: list[int]) -> None:
    at = random.randrange(len(stream))
    start = min(random.choice(starts), len(stream) - 1) if starts else 0
    match random.randrange(8):
        case 0 | 1:
            stream[at] ^= 1 << random.randrange(8)
        case 2:
            stream[at] = random.choice(b"\x00\x01\x02\x06\x7f\x80\xce\xff" + KINDS)
        case 3:  # a length, wherever one may be
            _write(stream, at, struct.pack(">I", random.choice((0, 1, 1 << 16, 1 << 31, (1 << 32) - 1))))
        case 4:  # the length of a frame
            (length,) = struct.unpack(">I", (stream[start + 3 : start + 7] + bytes(4))[:4])
            wrong = random.choice((length - 1, length + 1, 0, MAX_FRAME, MAX_FRAME + 1, (1 << 32) - 1))
            _write(stream, start + 3, struct.pack(">I", max(wrong, 0)))
        case 5:  # the size of a body, if that frame is a header
            _write(stream, start + 11, struct.pack(">Q", random.choice((0, 1, MAX_BODY, FULL_SIZE, (1 << 64) - 1))))
        case 6:
            del stream[at : at + random.choice((1, 2, 8, 100, len(stream)))]
        case 7:
            stream[at:at] = random.randbytes(random.choice((1, 2, 8, 100)))


def _write(stream: bytearray, at: int, data: bytes) -> None:
    stream[at : at + len(data)] = data[: max(len(stream) - at, 0)]


def payloads_of_noise(random: Random) -> bytes:
    """Frames that are well-formed, and nothing in them is."""
    frames = [deliver(1, 1)] if random.random() < 0.5 else []
    for _ in range(random.randint(1, 20)):
        kind, channel = random.choice((1, 1, 2, 3, 8)), random.randrange(8)
        payload = random.randbytes(random.choice((0, 3, 4, 13, 14, 40, 200)))
        if kind == METHOD and random.random() < 0.8:
            numbers = (BASIC_DELIVER, BASIC_RETURN, BASIC_ACK, BASIC_NACK, BASIC_CANCEL, CHANNEL_CLOSE, CONNECTION_BLOCKED)
            payload = struct.pack(">I", random.choice(numbers)) + payload
        frames.append(frame(kind, channel, payload))
    return b"".join(frames)


def properties_of_noise(random: Random) -> bytes:
    """Whole messages with properties that are random, nearly right, or a bomb."""
    frames: list[bytes] = []
    for tag in range(1, random.randint(2, 12)):
        raw = bytearray(random.choice(PROPERTY_BOMBS)(random) if random.random() < 0.05 else properties(random))
        for _ in range(random.choice((0, 1, 1, 3))):
            match random.randrange(3):
                case 0:
                    raw[random.randrange(len(raw))] = random.choice(b"\x00\x01\x06\x7f\x80\xff" + KINDS)
                case 1:
                    del raw[random.randrange(2, len(raw) + 1) :]
                case 2:
                    raw += random.randbytes(random.randint(1, 30))
        frames += [deliver(1, tag), header(1, 0, bytes(raw))]
    return b"".join(frames)


def _nested(kind: bytes, levels: int) -> bytes:
    inner, name = b"", b"" if kind == b"A" else b"\x01n"
    for _ in range(levels):
        inner = name + kind + length_and(inner)
    return headers_only((b"" if name else b"\x01n") + inner)


PROPERTY_BOMBS: tuple[Callable[[Random], bytes], ...] = (
    lambda random: _nested(b"F", random.choice((7, 8, 9, 500, 2000))),
    lambda random: _nested(b"A", random.choice((6, 7, 8, 500, 3000))),
    lambda random: headers_only(b"\x01nA" + length_and(b"V" * 16_000)),
    lambda random: headers_only(b"\x01nA" + length_and(b"F\x00\x00\x00\x00" * 3_200)),
    lambda random: headers_only(
        b"\x01nF" + length_and(b"".join(b"\x04%04dA\x00\x00\x00\x00" % number for number in range(1500)))
    ),
    lambda random: headers_only(b"\x01nF" + length_and(b"".join(b"\x03%03dV" % number for number in range(1000)) * 3)),
    lambda random: headers_only(b"".join(b"\x04%04dV" % number for number in range(random.choice((64, 65, 3000))))),
    lambda random: struct.pack(">HI", 1 << 13, random.choice((1 << 15, 1 << 31, (1 << 32) - 1))),
    lambda random: headers_only(b"\x01n" + random.choice((b"S", b"x", b"A", b"F")) + b"\xff\xff\xff\xff"),
    lambda random: headers_only(b"\x01nA" + length_and(b"A\xff\xff\xff\xff" * 100)),
    lambda random: headers_only(b"\x01nS" + length_and(b"\xff" * random.choice((16_000, 20_000, 30_000)))),
)


# Bombs: streams that would fill the memory of one who trusts them


class Bomb(NamedTuple):
    name: str
    pieces: Iterator[bytes]
    kept_per_byte: float
    """What may be held of each byte that was sent; 0 where nothing may be."""
    ends_in_error: bool = False


def bombs(random: Random, channels: int, size: int) -> list[Bomb]:
    """Each sends about `size` bytes, or something on each of so many consuming channels, numbered from 1000 on."""
    return [*_of_many_channels(random, range(1000, 1000 + channels)), *_of_one_channel(random, size), *_of_answers(random, size)]


def _of_many_channels(random: Random, channels: range) -> Iterator[Bomb]:
    """Each channel begins something and does not end it."""
    noise = random.randbytes(100)

    def on_each(write: Callable[[int], bytes]) -> Iterator[bytes]:
        return map(write, channels)

    yield Bomb("methods without a header", on_each(lambda channel: deliver(channel, 1)), 20)
    headers = on_each(lambda channel: deliver(channel, 1) + header(channel, FULL_SIZE, b"\x00\x00" + noise))
    yield Bomb("headers without a body", headers, 8)
    halves = on_each(lambda channel: deliver(channel, 1) + header(channel, 1 << 20) + frame(BODY, channel, noise))
    yield Bomb("half bodies", halves, 6)
    yield Bomb("channels that close", on_each(lambda channel: _close(channel, CHANNEL_CLOSE) * 3), 2)  # the reason of each


def _of_one_channel(random: Random, size: int) -> Iterator[Bomb]:
    channel, rounds = 1000, size // 4096
    noise = random.randbytes(4096 - 8)

    def body_of(announced: int, frames: bytes) -> Iterator[bytes]:
        return chain([deliver(channel, 1) + header(channel, announced)], repeat(frames, rounds))

    too_much = struct.pack(
        ">BHI", BODY, random.choice((0, PLAIN, channel)), random.choice((MAX_FRAME + 1, 1 << 31, (1 << 32) - 1))
    )
    yield Bomb("a frame that announces too much", iter([too_much, noise]), 0, ends_in_error=True)
    endless = struct.pack(">BHI", BODY, channel, MAX_FRAME)
    yield Bomb("a frame that does not end", chain([endless], repeat(noise, rounds)), 3)
    yield Bomb("a body beyond the cap", body_of((1 << 64) - 1, frame(BODY, channel, noise)), 0)
    yield Bomb("a body of empty pieces", body_of(1, frame(BODY, channel, b"") * 512), 0)
    yield Bomb("a body of tiny pieces", body_of(1 << 20, frame(BODY, channel, b"ab") * 409), 1)
    yield Bomb("consumers that are cancelled", repeat(method(channel, BASIC_CANCEL, b"\x03c.1\x01") * 200, rounds), 0)


def _of_answers(random: Random, size: int) -> Iterator[Bomb]:
    rounds = size // 4096
    method_of_return = method(PUBLISHING, BASIC_RETURN, b"\x01\x38\x00\x00\x00")
    endless = chain(
        [method_of_return + header(PUBLISHING, 1 << 63, numbered(1))], repeat(frame(BODY, PUBLISHING, bytes(4000)), rounds)
    )
    yield Bomb("a returned body without end", endless, 0)
    yield Bomb("the same return again and again", repeat(b"".join(returned(1, 0, random)) * 40, rounds), 0)
    unknown = (b"".join(returned(number, 0, random)) for number in range(PUBLISHED + 1, 1 << 30))
    yield Bomb("a return of what was not sent", unknown, 0, ends_in_error=True)
    acks = (method(PUBLISHING, BASIC_ACK, struct.pack(">QB", random.getrandbits(64), 1)) for _ in range(size // 21))
    yield Bomb("acks of everything", acks, 0)
    blocked = method(0, CONNECTION_BLOCKED, b"\x03low") + method(0, CONNECTION_UNBLOCKED)
    yield Bomb("blocked and unblocked", repeat(blocked * 100, rounds), 0)
