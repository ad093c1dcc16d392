"""The outbox's arithmetic: a model of concurrent transactions shows that the floor never passes a row that may still appear."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orderbus._core.outbox import Floor, fair_share, first_per_key, idle_wait_s, plan_lease, stuck_retry_s

KEYS = ("a", "b", "c")
PAGE = 3


@dataclass(frozen=True)
class Row:
    id: int
    key: str | None


@dataclass
class Snapshot:
    """What a transaction sees: everything below xmin has ended; of the others, what had committed when it was taken."""

    xmin: int
    rows: dict[int, Row]


@dataclass
class Writer:
    xid: int
    key: str
    rows: list[Row] = field(default_factory=list)


@dataclass
class Delete:
    ids: list[int]
    mark: int
    xid: int | None = None


@dataclass
class Read:
    floor: int
    snapshot: Snapshot
    last_id: int | None = None


class Database:
    """PostgreSQL as far as the floor rests on it: xids ascend, ids come from a sequence with CACHE 1, snapshots have an xmin."""

    def __init__(self) -> None:
        self.next_xid = 100
        self.last_id = 0
        self.running: set[int] = set()
        self.rows: dict[int, Row] = {}

    def begin(self) -> int:
        xid, self.next_xid = self.next_xid, self.next_xid + 1
        self.running.add(xid)
        return xid

    def snapshot(self) -> Snapshot:
        return Snapshot(min(self.running, default=self.next_xid), dict(self.rows))


class Relaying(RuleBasedStateMachine):
    """Writers that serialise on their key, and one relay whose reads and deletes are open to everything in between."""

    floor_type: type[Floor] = Floor

    def __init__(self) -> None:
        super().__init__()
        self.database = Database()
        self.floor = self.floor_type()
        self.writers: dict[str, Writer] = {}
        self.emitted: dict[str, list[int]] = {key: [] for key in KEYS}
        self.published: dict[str, list[int]] = {key: [] for key in KEYS}
        self.reading: Read | None = None
        self.page: list[Row] = []
        self.deleting: Delete | None = None

    @rule(key=st.sampled_from(KEYS))
    def begin(self, key: str) -> None:
        """A transaction takes its key's lock, and its xid."""
        if key not in self.writers:
            self.writers[key] = Writer(self.database.begin(), key)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        self._insert(self.writers[data.draw(st.sampled_from(sorted(self.writers)))])

    @rule(key=st.sampled_from(KEYS))
    def begin_and_insert(self, key: str) -> None:
        self.begin(key)
        self._insert(self.writers[key])

    @rule(key=st.sampled_from(KEYS))
    def write_at_once(self, key: str) -> None:
        if key not in self.writers:
            self.begin_and_insert(key)
            self._end(key, commits=True)

    def _insert(self, writer: Writer) -> None:
        self.database.last_id += 1
        writer.rows.append(Row(self.database.last_id, writer.key))

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), commits=st.booleans())
    def end(self, data: st.DataObject, commits: bool) -> None:
        self._end(data.draw(st.sampled_from(sorted(self.writers))), commits=commits)

    def _end(self, key: str, *, commits: bool) -> None:
        writer = self.writers.pop(key)
        self.database.running.discard(writer.xid)
        if commits:
            self.database.rows.update({row.id: row for row in writer.rows})
            self.emitted[writer.key].extend(row.id for row in writer.rows)

    @precondition(lambda self: self.reading is None and not self.page)
    @rule()
    def read_snapshot(self) -> None:
        self.reading = Read(self.floor.value, self.database.snapshot())

    @precondition(lambda self: self.reading is not None and self.reading.last_id is None)
    @rule()
    def read_sequence(self) -> None:
        """The sequence is not part of the snapshot: it may be read long after it."""
        assert self.reading is not None
        self.reading.last_id = self.database.last_id

    @precondition(lambda self: self.reading is not None and self.reading.last_id is not None)
    @rule()
    def read_return(self) -> None:
        reading, self.reading = self.reading, None
        assert reading is not None
        assert reading.last_id is not None
        page = [row for _, row in sorted(reading.snapshot.rows.items()) if row.id > reading.floor][:PAGE]
        self.floor.read(xmin=reading.snapshot.xmin, last_id=reading.last_id, lowest_id=page[0].id if page else None)
        gone = self.deleting.ids if self.deleting else []
        self.page = first_per_key(row for row in page if row.id in self.database.rows and row.id not in gone)

    @precondition(lambda self: self.page and self.deleting is None)
    @rule(data=st.data())
    def publish_and_send_delete(self, data: st.DataObject) -> None:
        """Some are confirmed; the others stay, and are read again."""
        confirmed = data.draw(st.lists(st.sampled_from(self.page), unique=True))
        self.page = []
        for row in confirmed:
            assert row.key is not None
            self.published[row.key].append(row.id)
        if confirmed:
            self.deleting = Delete([row.id for row in confirmed], self.floor.mark())

    @precondition(lambda self: self.deleting is not None and self.deleting.xid is None)
    @rule()
    def delete_runs(self) -> None:
        assert self.deleting is not None
        self.deleting.xid = self.database.begin()

    @precondition(lambda self: self.deleting is not None and self.deleting.xid is not None)
    @rule()
    def delete_commits(self) -> None:
        deleting, self.deleting = self.deleting, None
        assert deleting is not None
        assert deleting.xid is not None
        self.database.running.discard(deleting.xid)
        for row_id in deleting.ids:
            del self.database.rows[row_id]
        self.floor.deleted(deleting.mark, deleting.xid)

    @invariant()
    def the_floor_is_below_every_row_that_is_there_or_may_appear(self) -> None:
        deleted = set(self.deleting.ids) if self.deleting else set()
        remaining = [row_id for row_id in self.database.rows if row_id not in deleted]
        uncommitted = [row.id for writer in self.writers.values() for row in writer.rows]
        assert self.floor.value < min(remaining + uncommitted, default=self.floor.value + 1)

    @invariant()
    def each_key_is_published_in_commit_order_without_gaps(self) -> None:
        for key in KEYS:
            assert self.published[key] == self.emitted[key][: len(self.published[key])]

    def teardown(self) -> None:
        """When the writers have ended, a few more rounds publish all the rest, and the floor comes up to the last id."""
        for key in sorted(self.writers):
            self._end(key, commits=True)
        if self.deleting is not None:
            if self.deleting.xid is None:
                self.delete_runs()
            self.delete_commits()
        self.reading, self.page = None, []
        for _ in range(len(self.database.rows)):
            self._round()
        assert not self.database.rows
        self._touch()
        self.the_floor_is_below_every_row_that_is_there_or_may_appear()
        assert self.published == self.emitted
        assert self.floor.value == self.database.last_id

    @precondition(lambda self: self.reading is None and not self.page and self.deleting is None)
    @rule()
    def relay_at_once(self) -> None:
        self._round()

    def _round(self) -> None:
        self.read_snapshot()
        self.read_sequence()
        self.read_return()
        if self.page:
            ids = [row.id for row in self.page]
            for row in self.page:
                assert row.key is not None
                self.published[row.key].append(row.id)
            self.page = []
            self.deleting = Delete(ids, self.floor.mark())
            self.delete_runs()
            self.delete_commits()

    def _touch(self) -> None:
        """Read; delete, which may be of nothing; read."""
        for _ in range(2):
            self._round()
            xid = self.database.begin()
            self.database.running.discard(xid)
            self.floor.deleted(self.floor.mark(), xid)
        self._round()


class HighestSeen(Floor):
    """What a plain implementation would do: never look below the highest id seen."""

    def read(self, *, xmin: int, last_id: int, lowest_id: int | None) -> None:
        super().read(xmin=xmin, last_id=last_id, lowest_id=lowest_id)
        self.value = max(self.value, last_id if lowest_id is None else lowest_id - 1)


class TestRelaying(Relaying.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


class RelayingOnHighestSeen(Relaying):
    floor_type = HighestSeen


def test_the_model_notices_a_floor_that_is_the_highest_id_seen() -> None:
    case = RelayingOnHighestSeen()
    case.begin("a")
    case.database.last_id += 1
    case.writers["a"].rows.append(Row(1, "a"))
    case.begin("b")
    case.database.last_id += 1
    case.writers["b"].rows.append(Row(2, "b"))
    b = case.writers.pop("b")
    case.database.running.discard(b.xid)
    case.database.rows[2] = b.rows[0]
    case.read_snapshot()
    case.read_sequence()
    case.read_return()
    with pytest.raises(AssertionError):
        case.the_floor_is_below_every_row_that_is_there_or_may_appear()


def test_a_floor_rises_only_when_a_read_began_after_the_delete_had_ended() -> None:
    floor = Floor()
    floor.read(xmin=10, last_id=7, lowest_id=3)
    floor.deleted(floor.mark(), xid=12)
    floor.read(xmin=12, last_id=9, lowest_id=None)
    assert floor.value == 0
    floor.read(xmin=13, last_id=9, lowest_id=None)
    assert floor.value == 7


def test_a_floor_stays_below_the_lowest_row_that_remains() -> None:
    floor = Floor()
    floor.read(xmin=10, last_id=7, lowest_id=3)
    floor.deleted(floor.mark(), xid=12)
    floor.read(xmin=13, last_id=9, lowest_id=5)
    assert floor.value == 4


def test_the_mark_of_a_delete_is_what_was_known_when_it_was_sent_not_when_it_returned() -> None:
    floor = Floor()
    floor.read(xmin=10, last_id=7, lowest_id=3)
    mark = floor.mark()
    floor.read(xmin=10, last_id=20, lowest_id=8)
    floor.deleted(mark, xid=12)
    floor.read(xmin=13, last_id=20, lowest_id=None)
    assert floor.value == 7


def test_a_floor_rises_again_with_the_next_delete() -> None:
    floor = Floor()
    for last_id, xid in ((7, 12), (9, 14)):
        floor.read(xmin=xid - 1, last_id=last_id, lowest_id=last_id)
        floor.deleted(floor.mark(), xid)
        floor.read(xmin=xid + 1, last_id=last_id, lowest_id=None)
        assert floor.value == last_id


def test_a_delete_that_ends_while_another_is_waited_for_changes_nothing() -> None:
    floor = Floor()
    floor.read(xmin=10, last_id=7, lowest_id=3)
    floor.deleted(floor.mark(), xid=12)
    floor.read(xmin=11, last_id=20, lowest_id=8)
    floor.deleted(floor.mark(), xid=30)
    floor.read(xmin=13, last_id=20, lowest_id=None)
    assert floor.value == 7


def test_a_floor_of_another_history_begins_anew() -> None:
    """Such as that of a replica that was promoted before it had all: it hands out ids once more."""
    floor = Floor()
    floor.read(xmin=10, last_id=700, lowest_id=3)
    floor.deleted(floor.mark(), xid=12)
    floor.read(xmin=13, last_id=700, lowest_id=None)
    assert floor.value == 700
    floor.read(xmin=11, last_id=650, lowest_id=None)
    assert (floor.value, floor.mark()) == (0, 650)


rows = st.lists(st.builds(Row, st.integers(1, 10**9), st.sampled_from([None, *KEYS])), max_size=30)


@given(rows, st.sets(st.sampled_from(KEYS)))
def test_at_most_one_row_of_a_key_is_chosen_and_it_is_the_first(page: list[Row], unconfirmed: set[str]) -> None:
    chosen = first_per_key(page, unconfirmed)

    keys = [row.key for row in chosen if row.key is not None]
    assert len(keys) == len(set(keys))
    assert not unconfirmed.intersection(keys)
    assert [row for row in chosen if row.key is None] == [row for row in page if row.key is None]
    for row in chosen:
        assert row.key is None or row is next(candidate for candidate in page if candidate.key == row.key)


@given(st.sets(st.text(min_size=1, max_size=3), min_size=1, max_size=80), st.integers(1, 64))
def test_the_fair_shares_add_up_to_all_buckets_and_differ_by_one_at_most(live: set[str], buckets: int) -> None:
    shares = [fair_share(owner, live, buckets) for owner in live]
    assert sum(shares) == buckets
    assert max(shares) - min(shares) <= 1


@given(st.lists(st.sampled_from(["r1", "r2", "r3", "r4", "r5"]), min_size=1, max_size=40), st.data())
def test_leases_never_overlap_and_come_to_rest_evenly(calls: list[str], data: st.DataObject) -> None:
    held: dict[int, str] = {}
    live: set[str] = set()

    def lease(owner: str) -> None:
        live.add(owner)
        plan = plan_lease(owner, live, held, buckets=64)
        assert all(held.get(bucket, owner) == owner for bucket in plan)
        for bucket in [bucket for bucket, holder in held.items() if holder == owner and bucket not in plan]:
            del held[bucket]
        held.update(dict.fromkeys(plan, owner))

    for owner in calls:
        lease(owner)
    for _ in range(2):
        for owner in data.draw(st.permutations(sorted(live))):
            lease(owner)

    assert sorted(held) == list(range(64))
    counts = [list(held.values()).count(owner) for owner in live]
    assert max(counts) - min(counts) <= 1


def test_a_relay_that_leaves_keeps_only_what_it_names() -> None:
    held = {0: "a", 1: "a", 2: "b"}
    assert plan_lease("a", ["a", "b"], held, buckets=64, keep=[1, 2, 5]) == {1}
    assert plan_lease("a", ["a", "b"], held, buckets=64, keep=[]) == frozenset()


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_a_stuck_row_waits_longer_each_time_up_to_seven_and_a_half_minutes(attempts: int, jitter: float) -> None:
    assert 1 <= stuck_retry_s(attempts, jitter) <= 450
    assert stuck_retry_s(attempts, 0) <= stuck_retry_s(attempts + 1, 0)


def test_a_stuck_row_waits_a_second_then_twice_as_long_each_time_and_up_to_half_as_long_again() -> None:
    assert [stuck_retry_s(attempts, 0) for attempts in (1, 2, 3, 9, 10, 10**6)] == [1, 2, 4, 256, 300, 300]
    assert [stuck_retry_s(3, jitter) for jitter in (0.5, 1)] == [5, 6]


def test_the_wait_grows_from_5_ms_to_250_ms_while_nothing_is_found() -> None:
    assert [idle_wait_s(empty) for empty in (0, 1, 2, 3, 6, 7, 1000)] == [0, 0.005, 0.01, 0.02, 0.16, 0.25, 0.25]
