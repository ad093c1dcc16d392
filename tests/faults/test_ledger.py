"""The ledger finds what it is there to find."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tests.faults.ledger import APPLIED, FOLLOWED, LATER, PLACED, Count, Facts, Letter, Place, Source, count

PARKED = 7
ASKED_FOR, BAD_BODY = Place("q.dlq", "asked-for"), Place("q.dlq", "bad-body")
COMMITTED = {n: Source(f"k{n % 3}", n // 3 + 1, ASKED_FOR if n == PARKED else None) for n in range(12)}
HANDLED = tuple(n for n in COMMITTED if n != PARKED)
CLEAN = Facts(
    committed=COMMITTED,
    placed=HANDLED,
    applied=HANDLED[::-1],
    later=[0],
    trail=[(source.key, source.seq, n) for n, source in COMMITTED.items()],
    noted=tuple(COMMITTED),
    letters=[Letter(ASKED_FOR, PARKED)],
    handled={PLACED: 11, APPLIED: 11, LATER: 1, FOLLOWED: 12},
)


def with_its_inbox(facts: Facts) -> Facts:
    """One row for each effect that is there, and so nothing for the count to say about the inbox."""
    trail = {n for _, _, n in facts.trail or ()}
    counts = {PLACED: facts.placed, APPLIED: facts.applied, LATER: facts.later}
    return replace(facts, handled={name: len(set(found)) for name, found in counts.items()} | {FOLLOWED: len(trail)})


def swapped(trail: Any, one: int, other: int) -> list[tuple[str, int, int]]:
    trail = list(trail)
    trail[one], trail[other] = trail[other], trail[one]
    return trail


def test_a_run_in_which_nothing_went_wrong_is_clean() -> None:
    assert count(CLEAN) == Count(
        sent=12, parked=1, lost=0, doubled=0, ghosts=0, disordered=0, innocents_parked=0, misparked=0, repeated=0,
        handled={PLACED: 11, APPLIED: 11, LATER: 1, FOLLOWED: 12},
    )  # fmt: skip


def test_where_nobody_followed_no_order_was_looked_at() -> None:
    found = count(replace(CLEAN, trail=None, handled={PLACED: 11, APPLIED: 11, LATER: 1}))

    assert (found.disordered, found.is_clean) == (None, True)


def test_keys_may_overtake_each_other() -> None:
    assert count(replace(CLEAN, trail=swapped(CLEAN.trail, 0, 1))).is_clean


VIOLATIONS = ("lost", "doubled", "ghosts", "disordered", "innocents_parked", "misparked")
PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "lost-effect": ({"placed": HANDLED[1:]}, "lost"),
    "lost-follow-up": ({"applied": HANDLED[1:]}, "lost"),
    "lost-reminder": ({"later": []}, "lost"),
    "lost-on-the-trail": ({"trail": list(CLEAN.trail or ())[:-1]}, "lost"),
    "lost-note": ({"noted": HANDLED}, "lost"),
    "lost-letter": ({"letters": []}, "lost"),
    "doubled-effect": ({"placed": (*HANDLED, 3)}, "doubled"),
    "doubled-follow-up": ({"applied": (*HANDLED, 3)}, "doubled"),
    "doubled-reminder": ({"later": [0, 0]}, "doubled"),
    "ghost-reminder": ({"later": [0, 1_000_020]}, "ghosts"),
    "doubled-on-the-trail": ({"trail": [*(CLEAN.trail or ()), ("k2", 4, 11)]}, "doubled"),
    "parked-and-handled": ({"placed": (*HANDLED, PARKED)}, "doubled"),
    "ghost-effect": ({"placed": (*HANDLED, 1_000_010)}, "ghosts"),
    "ghost-follow-up": ({"applied": (*HANDLED, 1_000_010)}, "ghosts"),
    "ghost-on-the-trail": ({"trail": [*(CLEAN.trail or ()), ("ghost", 0, 1_000_010)]}, "ghosts"),
    "ghost-note": ({"noted": (*COMMITTED, 1_000_010)}, "ghosts"),
    "swapped-pair": ({"trail": swapped(CLEAN.trail, 0, 3)}, "disordered"),
    "innocent-parked": ({"letters": [*CLEAN.letters, Letter(Place("q.dlq", "retries-exhausted"), 3)]}, "innocents_parked"),
    "stranger-missing": ({"strangers": {BAD_BODY: 1}}, "innocents_parked"),
    "stranger-too-many": (
        {"letters": [*CLEAN.letters, *[Letter(BAD_BODY, None)] * 2], "strangers": {BAD_BODY: 1}},
        "innocents_parked",
    ),
    "parked-for-a-wrong-reason": ({"letters": [Letter(Place("q.dlq", "retries-exhausted"), PARKED)]}, "misparked"),
    "parked-in-a-wrong-queue": ({"letters": [Letter(Place("other.dlq", "asked-for"), PARKED)]}, "misparked"),
    "parked-once-more-for-a-wrong-reason": (
        {"letters": [*CLEAN.letters, Letter(Place("q.dlq", "rejected"), PARKED)]},
        "misparked",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_is_found_and_is_the_only_one(planted: str) -> None:
    changes, kind = PLANTED[planted]

    found = count(with_its_inbox(replace(CLEAN, **changes)))

    assert {name: getattr(found, name) for name in VIOLATIONS} == dict.fromkeys(VIOLATIONS, 0) | {kind: 1}
    assert len(found.words) == 1


@pytest.mark.parametrize("place", [Place("q.dlq", "worse-body"), Place("other.dlq", "bad-body")])
def test_a_stranger_for_a_wrong_reason_or_in_a_wrong_queue_is_one_missing_and_one_that_should_not_be_there(place: Place) -> None:
    found = count(replace(CLEAN, letters=[*CLEAN.letters, Letter(place, None)], strangers={BAD_BODY: 1}))

    assert (found.innocents_parked, len(found.words)) == (2, 2)


@pytest.mark.parametrize("consumer", [PLACED, APPLIED, FOLLOWED])
@pytest.mark.parametrize("more", [-1, 1])
def test_an_inbox_that_does_not_match_its_effects_is_no_clean_end(consumer: str, more: int) -> None:
    assert not count(replace(CLEAN, handled={**CLEAN.handled, consumer: CLEAN.handled[consumer] + more})).is_clean


@pytest.mark.parametrize("consumer", [PLACED, APPLIED, LATER, FOLLOWED])
def test_effects_of_a_consumer_without_any_row_in_the_inbox_are_no_clean_end(consumer: str) -> None:
    found = count(replace(CLEAN, handled={name: rows for name, rows in CLEAN.handled.items() if name != consumer}))

    assert found.words == (f"0 rows in the inbox of {consumer} beside {CLEAN.handled[consumer]} effects",)


@pytest.mark.parametrize("what", ["unpublished", "unhandled"])
def test_what_is_left_behind_is_no_clean_end(what: str) -> None:
    assert not count(replace(CLEAN, **{what: 1})).is_clean


@pytest.mark.parametrize("again", [{"noted": (*COMMITTED, 3)}, {"letters": [*CLEAN.letters, *CLEAN.letters]}])
def test_an_outside_effect_or_a_letter_that_comes_again_is_told_and_is_no_violation(again: dict[str, Any]) -> None:
    found = count(replace(CLEAN, **again))

    assert (found.repeated, found.is_clean) == (1, True)


@pytest.mark.parametrize(("most", "is_clean"), [(0, False), (1, True)])
def test_more_that_comes_again_than_the_scenario_allows_is_a_violation(most: int, is_clean: bool) -> None:
    assert count(replace(CLEAN, noted=(*COMMITTED, 3), most_repeated=most)).is_clean == is_clean


@pytest.mark.parametrize(("least", "is_clean"), [(1, True), (2, False)])
def test_less_that_comes_again_than_the_scenario_must_bring_about_is_a_violation(least: int, is_clean: bool) -> None:
    assert count(replace(CLEAN, noted=(*COMMITTED, 3), least_repeated=least)).is_clean == is_clean
