"""Confirms and settlements: arithmetic on numbers, against the plainest model of it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, strategies as st

from orderbus._core.message import Receipt, Settlement
from orderbus.adapters.rabbitmq.confirms import Confirms, SentBatch
from orderbus.adapters.rabbitmq.frames import BASIC_ACK, BASIC_NACK, BASIC_REJECT
from orderbus.adapters.rabbitmq.settlements import Settlements
from orderbus.errors import InvariantError


def send(confirms: Confirms, count: int, done: list[SentBatch]) -> SentBatch:
    batch = confirms.begin(lambda: done.append(batch))
    confirms.sent(batch, count)
    confirms.finish(batch)
    return batch


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    answers=st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.booleans(), st.booleans()), max_size=40),
)
def test_each_publish_gets_its_own_answer(sizes: list[int], answers: list[tuple[int, bool, bool, bool]]) -> None:
    confirms = Confirms()
    done: list[SentBatch] = []
    batches = [send(confirms, size, done) for size in sizes]
    total = sum(sizes)
    model: dict[int, Receipt] = {}
    returned: set[int] = set()
    for tag, multiple, accepted, is_returned in answers:
        if tag > total:
            continue
        if is_returned:
            assert confirms.returned(tag) == (tag not in model)
            returned |= {tag} - set(model)
        confirms.answer(tag, multiple=multiple, accepted=accepted)
        for number in range(1 if multiple else tag, tag + 1):
            plain = Receipt.CONFIRMED if accepted else Receipt.REFUSED
            model.setdefault(number, Receipt.UNROUTABLE if number in returned else plain)
    receipts = [receipt for batch in batches for receipt in batch.receipts]
    assert receipts == [model.get(number) for number in range(1, total + 1)]
    assert confirms.open == total - len(model)
    assert {id(batch) for batch in done} == {id(batch) for batch in batches if None not in batch.receipts}
    assert len(done) == len({id(batch) for batch in done})


def test_a_return_for_which_nothing_waits_is_not_kept() -> None:
    confirms = Confirms()
    send(confirms, 2, [])
    confirms.answer(1, multiple=False, accepted=True)
    assert [confirms.returned(number) for number in (0, 1, 2, 3, 2**63 - 1)] == [False, False, True, False, False]
    confirms.lose()
    assert confirms.returned(1)  # nobody is told anything any more


def test_a_loss_ends_every_wait() -> None:
    confirms = Confirms()
    done: list[SentBatch] = []
    first, second = send(confirms, 2, done), send(confirms, 1, done)
    confirms.answer(1, multiple=False, accepted=True)
    confirms.lose()
    assert done == [first, second]
    assert first.receipts == [Receipt.CONFIRMED, None]


def test_a_batch_answered_while_it_is_sent_is_done_once_it_is_whole() -> None:
    confirms = Confirms()
    done: list[SentBatch] = []
    batch = confirms.begin(lambda: done.append(batch))
    confirms.sent(batch, 1)
    confirms.answer(1, multiple=False, accepted=True)
    assert not done
    confirms.sent(batch, 1)
    confirms.finish(batch)
    confirms.answer(2, multiple=True, accepted=True)
    assert done == [batch]
    assert batch.receipts == [Receipt.CONFIRMED] * 2


GIVEN_BACK = {
    (BASIC_NACK, 2): Settlement.RELEASE,
    (BASIC_REJECT, 1): Settlement.REJECT,
    (BASIC_REJECT, 0): Settlement.DEAD_LETTER,
}


class Queue:
    """What RabbitMQ does with settlement frames: an unknown tag closes the channel."""

    def __init__(self, tags: int) -> None:
        self.open = set(range(1, tags + 1))
        self.settled: dict[int, Settlement] = {}

    def take(self, data: bytes) -> None:
        for kind, _channel, length, method, tag, bits, end in struct.iter_unpack(">BHIIQBB", data):
            assert (kind, length, end) == (1, 13, 0xCE)
            assert tag in self.open
            if method == BASIC_ACK:
                tags = {other for other in self.open if other <= tag} if bits else {tag}
                self.settled.update(dict.fromkeys(tags, Settlement.ACK))
            else:
                tags = {tag}
                self.settled[tag] = GIVEN_BACK[method, bits]
            self.open -= tags


@given(
    st.permutations(range(1, 16)), st.lists(st.sampled_from(Settlement), min_size=15, max_size=15), st.sets(st.integers(0, 14))
)
def test_every_settlement_says_what_was_meant(order: list[int], hows: list[Settlement], writes: set[int]) -> None:
    settlements, queue = Settlements(4), Queue(20)
    meant: dict[int, Settlement] = {}
    for index, (tag, how) in enumerate(zip(order, hows, strict=True)):
        settlements.add(tag, how)
        meant[tag] = how
        if index in writes:
            queue.take(settlements.take())
            assert queue.settled == meant
    queue.take(settlements.take())
    assert queue.settled == meant
    assert settlements.take() == b""


def test_acks_in_a_row_are_one_frame() -> None:
    settlements = Settlements(4)
    for tag in (2, 1, 3, 4):
        settlements.add(tag, Settlement.ACK)
    assert len(settlements.take()) == 21


def test_settling_twice_is_a_bug() -> None:
    settlements = Settlements(4)
    settlements.add(1, Settlement.ACK)
    with pytest.raises(InvariantError):
        settlements.add(1, Settlement.RELEASE)
    settlements.take()
    with pytest.raises(InvariantError):
        settlements.add(1, Settlement.ACK)
