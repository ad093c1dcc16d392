"""Millions of bytes through splitter, content decoder and property decoder: `python -m tests.rabbitmq.fuzz --bytes N --seed S`.

A case passes when nothing but FrameError comes out of the splitter and nothing but MessageError out of the properties, when the
same bytes lead to the same however they are cut, when an undamaged stream gives all its messages, and when the memory stays
in proportion to what was sent. The same seed gives the same bytes; a case that fails is named, and `--case` runs it alone.
"""

from __future__ import annotations

import argparse
import hashlib
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from random import Random
from typing import NamedTuple

from orderbus._core.message import Incoming
from orderbus.adapters.rabbitmq.confirms import Confirms, SentBatch
from orderbus.adapters.rabbitmq.content import ConfirmSink, ConnectionSink, DeliverySink
from orderbus.adapters.rabbitmq.fields import Unsendable, decode_properties, encode_headers
from orderbus.adapters.rabbitmq.frames import FrameError, FrameSplitter
from orderbus.errors import MessageError
from tests.rabbitmq.hostile import (
    CONSUMING,
    MAX_BODY,
    PUBLISHED,
    PUBLISHING,
    bombs,
    damaged,
    payloads_of_noise,
    properties_of_noise,
    valid_stream,
)

BOMB_EVERY = 500
"""So many cases are one stream each; the next is all bombs."""
BOMB_BYTES = 64 * 1024
BOMB_CHANNELS = 2_000
SLACK_BYTES = 64 * 1024
MEMORY_PER_BYTE = 128
"""While an array of 16,000 values of one byte is encoded again, Python needs 90 for each; and no table is longer."""


class Report(NamedTuple):
    seed: int
    bytes: int
    cases: int
    peak_bytes: int
    outcomes: Counter[str]


class Fault(AssertionError):
    """A case that did not pass."""


def run(seed: int, wanted_bytes: int, only_case: int | None = None) -> Report:
    """Cases until so many bytes were generated. Raises Fault, naming the case."""
    outcomes: Counter[str] = Counter()
    size, number, peak = 0, only_case or 0, 0
    with traced():
        while size < wanted_bytes and (only_case is None or number == only_case):
            random = Random(f"{seed}/{number}")
            try:
                check = bomb_case if number % BOMB_EVERY == BOMB_EVERY - 1 else stream_case
                done, case_peak = check(random, outcomes)
            except Exception as failure:
                again = f"python -m tests.rabbitmq.fuzz --seed {seed} --case {number}"
                raise Fault(f"case {number} of seed {seed}: {type(failure).__name__}: {failure}; again: {again}") from failure
            size += done
            number += 1
            peak = max(peak, case_peak)
    return Report(seed, size, number - (only_case or 0), peak, outcomes)


@contextmanager
def traced() -> Iterator[None]:
    was_tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield
    finally:
        if not was_tracing:
            tracemalloc.stop()


class Receiver:
    """All that stands behind a socket, and a reader that takes every message at once."""

    def __init__(self, channels: Iterable[int] = CONSUMING, max_body: int = MAX_BODY) -> None:
        self.outcomes: Counter[str] = Counter()
        self.error: FrameError | None = None
        self._splitter = FrameSplitter()
        self._log = {number: hashlib.blake2b() for number in (0, *channels)}
        self._splitter.routes[0] = ConnectionSink(self._overheard, self._overheard)
        self._passed_on = hashlib.blake2b()
        self._ready: set[int] = set()
        self._sinks = {number: self._sink(number, max_body) for number in channels}
        self._splitter.routes.update(self._sinks)
        confirms = Confirms()
        self._batches: list[SentBatch] = []
        for _ in range(PUBLISHED // 4):
            self._batches.append(batch := confirms.begin(lambda: None))
            confirms.sent(batch, 4)
            confirms.finish(batch)
        self._confirm_sink = ConfirmSink(confirms)
        self._splitter.routes[PUBLISHING] = self._confirm_sink

    def feed(self, pieces: Iterable[bytes]) -> None:
        """Take them until one is refused."""
        for piece in pieces:
            try:
                self._passed_on.update(self._splitter.feed(piece))
            except FrameError as error:
                self.error = error
            self._take_all()
            if self.error is not None:
                break

    @property
    def result(self) -> str:
        """All that it led to."""
        return repr(
            (
                [log.hexdigest() for log in self._log.values()],
                [(sink.failure, sink.cancelled, sink.is_closed) for sink in self._sinks.values()],
                [batch.receipts for batch in self._batches],
                self._confirm_sink.failure,
                sorted(self._splitter.routes),
                # What stood before an error in the same piece goes nowhere.
                "an error" if self.error is not None else self._passed_on.hexdigest(),
            )
        )

    def _sink(self, number: int, max_body: int) -> DeliverySink:
        return DeliverySink("q", 1, decode_properties, lambda: self._ready.add(number), max_body)

    def _overheard(self, reason: str | None) -> None:
        self._log[0].update(repr(reason).encode())

    def _take_all(self) -> None:
        for number in self._ready:
            sink = self._sinks[number]
            arrived, sink.arrived = sink.arrived, []
            for delivery in arrived:
                self._log[number].update(self._read(delivery).encode())
        self._ready.clear()

    def _read(self, delivery: Incoming) -> str:
        self.outcomes["messages"] += 1
        assert delivery._decode is not None
        try:
            read = delivery._decode(delivery.raw)  # the property `properties` would hide an unexpected error
        except MessageError as failure:
            self.outcomes[failure.reason] += 1
            return f"{delivery!r} {failure.reason} {failure}"
        with suppress(Unsendable):  # it may take more room in our types than in those of the sender
            encode_headers(read.headers)
        return f"{delivery!r} {delivery.exchange} {delivery.routing_key} {delivery.redelivered} {delivery.body!r} {read!r}"


def stream_case(random: Random, outcomes: Counter[str]) -> tuple[int, int]:
    kind = random.choices(("valid", "damaged", "noisy payloads", "noisy properties", "noise"), (3, 10, 3, 3, 1))[0]
    expected = None
    match kind:
        case "valid":
            frames, expected = valid_stream(random)
            stream = b"".join(frames)
        case "damaged":
            stream = damaged(random, valid_stream(random).frames)
        case "noisy payloads":
            stream = payloads_of_noise(random)
        case "noisy properties":
            stream = properties_of_noise(random)
        case _:
            stream = random.randbytes(random.choice((8, 100, 2000)))
    whole = Receiver()
    with memory(MEMORY_PER_BYTE * len(stream) + SLACK_BYTES, kind) as held:
        whole.feed([stream])
    cut = Receiver()
    cut.feed(cut_up(random, stream))
    if cut.result != whole.result:
        raise Fault(f"{kind}: the way the stream is cut changes what it leads to")
    if expected is not None and (whole.error is not None or whole.outcomes["messages"] != expected):
        raise Fault(f"{whole.outcomes['messages']} of {expected} messages came out of an undamaged stream: {whole.error}")
    if expected is not None and whole.outcomes["malformed-properties"]:
        raise Fault("a message of an undamaged stream was called malformed")
    outcomes[kind] += 1
    outcomes["ended in an error"] += whole.error is not None
    outcomes.update(whole.outcomes)
    return len(stream), held[0]


def cut_up(random: Random, stream: bytes) -> Iterator[bytes]:
    step = random.choice((1, 2, 7, 100, 1460))
    at = 0
    while at < len(stream):
        end = at + (step if step < 7 else random.randint(1, 2 * step))
        yield stream[at:end]
        at = end


def bomb_case(random: Random, outcomes: Counter[str]) -> tuple[int, int]:
    """Each bomb against a receiver of its own."""
    total = peak = 0
    for bomb in bombs(random, BOMB_CHANNELS, BOMB_BYTES):
        receiver = Receiver(range(1000, 1000 + BOMB_CHANNELS), 1 << 24)
        sent = 0

        def counted(pieces: Iterator[bytes]) -> Iterator[bytes]:
            nonlocal sent
            for piece in pieces:
                sent += len(piece)
                yield piece

        with memory(None, bomb.name) as held:
            receiver.feed(counted(bomb.pieces))
        if held[0] > bomb.kept_per_byte * sent + SLACK_BYTES:
            raise Fault(f"{bomb.name}: {held[0]} bytes of memory for {sent} bytes")
        if (receiver.error is not None) != bomb.ends_in_error:
            raise Fault(f"{bomb.name}: ended with {receiver.error!r}")
        total += sent
        peak = max(peak, held[0])
        outcomes["bombs"] += 1
    return total, peak


@contextmanager
def memory(limit_bytes: int | None, what: str) -> Iterator[list[int]]:
    """How much more memory there was inside, at its peak."""
    held = [0]
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    yield held
    held[0] = tracemalloc.get_traced_memory()[1] - before
    if limit_bytes is not None and held[0] > limit_bytes:
        raise Fault(f"{what}: {held[0]} bytes of memory, {limit_bytes} is the limit")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.rabbitmq.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=int, default=10_000_000, help="generate at least so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: %(default)s)")
    parser.add_argument("--case", type=int, help="only the case of this number")
    arguments = parser.parse_args()
    began = time.monotonic()
    report = run(arguments.seed, arguments.bytes, arguments.case)
    print(f"seed {report.seed}: {report.bytes:,} bytes in {report.cases:,} cases, {time.monotonic() - began:.0f} s")
    print(f"peak memory of a case: {report.peak_bytes:,} bytes")
    for name, count in sorted(report.outcomes.items()):
        print(f"  {name}: {count:,}")


if __name__ == "__main__":
    main()
