"""The two orders in which a consumer takes up its deliveries, as state machines without any time of their own."""

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orderbus._core.message import Incoming, Properties
from orderbus._core.work import AnyOrder, KeyOrder, Work, by_key


def work(key: str | None, n: int) -> Work:
    headers = {} if key is None else {"ob-key": key}
    made = Work(
        Incoming(queue="q", exchange="", routing_key="", body=b"", tag=n, epoch=1, properties=Properties(headers=headers))
    )
    made.key = key
    return made


def unreadable() -> Work:
    def decode(raw: bytes) -> Properties:
        raise UnicodeDecodeError("utf-8", raw, 0, 1, "no")

    return Work(Incoming(queue="q", exchange="", routing_key="", body=b"", tag=0, epoch=1, raw=b"\xff", decode=decode))


keys = st.sampled_from(["a", "b", "c", None])


class Intake(RuleBasedStateMachine):
    """Deliveries come, are taken, wait, come back and leave, in any interleaving."""

    make = AnyOrder
    most_followers = 10_000

    def __init__(self) -> None:
        super().__init__()
        self.intake = self.make() if self.make is AnyOrder else KeyOrder(self.most_followers)
        self.sent = 0
        self.now = 0.0
        self.taken: list[Work] = []
        self.waiting: list[Work] = []
        self.left: list[Work] = []

    @rule(batch=st.lists(keys, min_size=1, max_size=6))
    def arrive(self, batch: list[str | None]) -> None:
        works = []
        for key in batch:
            self.sent += 1
            works.append(work(key, self.sent))
        self.intake.add(works)

    @rule(most=st.integers(1, 4))
    def take(self, most: int) -> None:
        taken = self.intake.take(most)
        assert len(taken) <= most
        if any(one.solo for one in taken):
            assert len(taken) == 1
        self.taken += taken

    @precondition(lambda self: any(not one.crowded for one in self.taken))
    @rule(data=st.data(), delay=st.floats(0, 10), solo=st.booleans(), yields=st.booleans())
    def fail(self, data: st.DataObject, delay: float, solo: bool, yields: bool) -> None:
        one = data.draw(st.sampled_from([one for one in self.taken if not one.crowded]))
        self.taken.remove(one)
        one.solo, one.yields = solo, yields
        self.waiting.append(one)
        self.intake.wait(one, self.now + delay)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        one = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.left.append(one)
        self.intake.done(one)

    @rule(seconds=st.floats(0, 5))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.intake.wake(self.now)
        due = self.intake.next_due()
        assert due is None or due > self.now

    @invariant()
    def nothing_is_held_twice(self) -> None:
        held = [one.incoming.tag for one in self.taken + self.left]
        assert len(held) == len(set(held))

    def teardown(self) -> None:
        rest = self.intake.drain()
        held = sorted(one.incoming.tag for one in rest + self.taken + self.left)
        assert held == list(range(1, self.sent + 1))
        assert self.intake.ready() == 0
        assert self.intake.take(5) == []


class OrderedIntake(Intake):
    make = KeyOrder

    @invariant()
    def a_key_is_in_one_pair_of_hands_and_leaves_in_order(self) -> None:
        running = [one.key for one in self.taken if one.key is not None]
        assert len(running) == len(set(running))
        for key in "abc":
            tags = [one.incoming.tag for one in self.left if one.key == key]
            assert tags == sorted(tags)


class CrowdedIntake(OrderedIntake):
    most_followers = 2

    @invariant()
    def only_what_may_yield_is_crowded_out(self) -> None:
        assert all(one.yields for one in self.taken if one.crowded)


TestAnyOrder = Intake.TestCase
TestKeyOrder = OrderedIntake.TestCase
TestCrowdedKeyOrder = CrowdedIntake.TestCase
TestAnyOrder.settings = TestKeyOrder.settings = TestCrowdedKeyOrder.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)


def test_others_pass_what_waits() -> None:
    intake = AnyOrder()
    intake.add([work("a", 1), work("a", 2)])
    (first,) = intake.take(1)
    intake.wait(first, 5.0)

    assert [one.incoming.tag for one in intake.take(9)] == [2]
    assert intake.next_due() == 5.0
    intake.wake(4.9)
    assert intake.take(9) == []
    intake.wake(5.0)
    assert intake.take(9) == [first]


def test_a_solo_one_comes_alone_and_in_its_turn() -> None:
    intake = AnyOrder()
    works = [work("a", n) for n in range(4)]
    works[2].solo = True
    intake.add(works)

    assert [[one.incoming.tag for one in intake.take(9)] for _ in range(4)] == [[0, 1], [2], [3], []]


def test_followers_of_a_key_wait_for_its_head_and_other_keys_do_not() -> None:
    intake = KeyOrder(100)
    intake.add([work("a", 1), work("a", 2), work("b", 3), work(None, 4), work(None, 5)])

    taken = intake.take(9)
    assert [one.incoming.tag for one in taken] == [1, 3, 4, 5]
    intake.wait(taken[0], 1.0)
    assert intake.take(9) == []
    intake.wake(1.0)
    assert intake.take(9) == [taken[0]]
    intake.done(taken[0])
    assert [one.incoming.tag for one in intake.take(9)] == [2]


def test_a_head_that_may_yield_is_crowded_out_when_it_begins_to_wait_or_when_followers_come() -> None:
    for followers_first in (True, False):
        intake = KeyOrder(1)
        followers = [work("a", n) for n in (2, 3)]
        intake.add([work("a", 1), *(followers if followers_first else [])])
        (head,) = intake.take(1)
        head.yields = True
        intake.wait(head, 1000.0)
        if not followers_first:
            assert intake.take(1) == []
            intake.add(followers)

        assert intake.take(1) == [head]
        assert head.crowded


@pytest.mark.parametrize("followers_first", [True, False])
def test_as_many_followers_as_there_may_be_crowd_nobody_out(followers_first: bool) -> None:
    intake = KeyOrder(2)
    followers = [work("a", n) for n in (2, 3)]
    intake.add([work("a", 1), *(followers if followers_first else [])])
    (head,) = intake.take(1)
    head.yields = True
    intake.wait(head, 1000.0)
    if not followers_first:
        intake.add(followers)

    assert intake.take(1) == []
    assert not head.crowded


def test_of_those_that_wait_until_the_same_moment_the_first_to_begin_is_the_first_to_come_back() -> None:
    intake = AnyOrder()
    intake.add([work(key, n) for n, key in enumerate("cab")])
    taken = intake.take(9)
    for one in taken:
        intake.wait(one, 5.0)
    intake.wake(5.0)

    assert intake.take(9) == taken


def test_a_key_that_is_no_text_is_none() -> None:
    intake = KeyOrder(1)
    works = [
        Work(
            Incoming(
                queue="q", exchange="", routing_key="", body=b"", tag=n, epoch=1, properties=Properties(headers={"ob-key": 5})
            )
        )
        for n in range(2)
    ]
    intake.add(works)

    assert intake.take(9) == works
    assert [one.key for one in works] == [None, None]
    for one in works:
        intake.done(one)
    assert intake.take(9) == []


def test_a_key_that_has_left_is_done_once() -> None:
    intake = KeyOrder(1)
    intake.add([work("a", 1)])
    (one,) = intake.take(1)
    intake.done(one)
    intake.done(one)
    intake.add([work("a", 2)])

    assert [other.incoming.tag for other in intake.take(9)] == [2]


def test_what_has_no_key_comes_before_every_key() -> None:
    works = [work("A", 1), work(None, 2)]

    assert by_key(works) == works[::-1]


def test_a_head_that_may_not_yield_keeps_its_place_however_many_follow() -> None:
    intake = KeyOrder(1)
    intake.add([work("a", n) for n in range(20)])
    (head,) = intake.take(1)
    intake.wait(head, 1000.0)

    assert intake.take(1) == []
    assert not head.crowded


def test_a_message_whose_headers_can_not_be_read_has_no_order() -> None:
    intake = KeyOrder(1)
    broken = unreadable()
    intake.add([work("a", 1), broken])

    assert [one.key for one in intake.take(9)] == ["a", None]


@given(st.lists(st.tuples(keys, st.integers()), max_size=30))
def test_sorting_by_key_keeps_the_order_within_a_key(pairs: list[tuple[str | None, int]]) -> None:
    works = [work(key, n) for key, n in pairs]
    in_order = by_key(works)

    assert sorted(map(id, in_order)) == sorted(map(id, works))
    for key in {key for key, _ in pairs}:
        assert [one for one in in_order if one.key == key] == [one for one in works if one.key == key]
    assert [one.key or "" for one in in_order] == sorted(one.key or "" for one in works)
