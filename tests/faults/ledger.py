"""The count at the end of a fault run: what was committed against what the servers hold. Pure; tests/faults/test_ledger.py plants bugs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

PLACED, APPLIED, FOLLOWED = "faults.faults.placed", "faults.faults.applied", "faults-trail.faults.placed"
LATER = "faults.faults.later"
"""The consumers that have an inbox."""
REMINDED_EVERY = 20
"""With each number of the producer's that this divides, an event for later was emitted."""
PRODUCED_BELOW = 10**15
"""The producer's numbers. Those above are of scenarios that publish events of their own, or of transactions that were rolled back."""


class Place(NamedTuple):
    """Where a parked message lies, and why."""

    queue: str
    reason: str

    def __str__(self) -> str:
        return f"in {self.queue} ({self.reason})"


class Source(msgspec.Struct, frozen=True):
    """What one committed transaction said of one event."""

    key: str
    seq: int
    parked: Place | None = None
    """Where it must end up, if its handler does not get through with it."""


class Letter(msgspec.Struct, frozen=True):
    """A message in a dead letter queue; `n` is None where the body is no event of the run."""

    place: Place
    n: int | None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What each source of truth holds when everything is quiet.

    `placed`, `applied` and `later`: a number for each row of effect. `trail`: key, seq and n in the order in which they were written; None where
    nobody followed. `noted`: effects outside any database, a number each; None where nobody noted. `unpublished`: rows of the outbox
    and stuck ones. `unhandled`: messages in queues that are no dead letter queues. `handled`: rows of the inbox, for each consumer.
    `strangers`: where the letters must lie that the run sent to be parked, and how many. `most_repeated`: how many may come again; None
    where docs/guarantees.md sets no bound. `least_repeated`: how many must, for the scenario to have done what it says.
    """

    committed: Mapping[int, Source]
    placed: Sequence[int]
    applied: Sequence[int]
    later: Sequence[int] = ()
    trail: Sequence[tuple[str, int, int]] | None = None
    noted: Sequence[int] | None = None
    letters: Sequence[Letter] = ()
    unpublished: int = 0
    unhandled: int = 0
    handled: Mapping[str, int] = {}
    strangers: Mapping[Place, int] = {}
    most_repeated: int | None = None
    least_repeated: int = 0


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """All but `sent`, `handled`, `parked` and `repeated` must be 0. `disordered` is None where nobody followed any order.

    `misparked` were to be parked, and lie in another queue or with another reason. `repeated` are letters and outside effects that
    came again: docs/guarantees.md, "When a process dies", says when they may.
    """

    sent: int
    parked: int
    lost: int
    doubled: int
    ghosts: int
    disordered: int | None
    innocents_parked: int
    misparked: int
    repeated: int
    handled: Mapping[str, int] = {}
    words: tuple[str, ...] = ()
    """One line for each kind of violation, with the first numbers."""

    @property
    def is_clean(self) -> bool:
        return not self.words


def count(facts: Facts) -> Count:
    """Compare. Every violation is counted once, and named in `words`."""
    words: list[str] = []
    committed = set(facts.committed)
    places = {n: source.parked for n, source in facts.committed.items() if source.parked}
    parks = places.keys()
    guilty = [letter for letter in facts.letters if letter.n in parks]
    others = [letter for letter in facts.letters if letter.n not in parks and letter.place not in facts.strangers]
    parked = {letter.n for letter in guilty if letter.n is not None}
    repeated = len(guilty) - len(parked)

    def found(what: str, numbers: Sequence[object]) -> int:
        if numbers:
            words.append(f"{len(numbers)} {what}: {', '.join(map(str, numbers[:5]))}{' …' if len(numbers) > 5 else ''}")
        return len(numbers)

    lost = found("lost, never placed", sorted(committed - parks - set(facts.placed)))
    lost += found("lost, never applied", sorted(committed - parks - set(facts.applied)))
    lost += found("lost, never parked", sorted(parks - parked))
    reminded = {n for n in committed if n % REMINDED_EVERY == 0 and n < PRODUCED_BELOW}
    lost += found("lost, never reminded of", sorted(reminded - set(facts.later)))
    doubled = found("placed twice", _again(facts.placed)) + found("applied twice", _again(facts.applied))
    doubled += found("reminded of twice", _again(facts.later))
    everywhere = {*facts.placed, *facts.applied, *facts.later, *(letter.n for letter in others if letter.n is not None)}
    disordered = None
    if facts.trail is not None:
        followed = [n for _, _, n in facts.trail]
        lost += found("lost, never followed", sorted(committed - set(followed)))
        doubled += found("followed twice", _again(followed))
        disordered = found("followed out of order", list(_disordered(facts.trail)))
        everywhere.update(followed)
    if facts.noted is not None:
        lost += found("lost, never noted", sorted(committed - set(facts.noted)))
        repeated += len(facts.noted) - len(set(facts.noted))
        everywhere.update(facts.noted)
    ghosts = found("ghosts", sorted(everywhere - committed))
    wrongly_applied = found("handled and parked", sorted(parks & {*facts.placed, *facts.applied}))
    misparked = [f"{letter.n} {letter.place}" for letter in guilty if letter.n is not None and letter.place != places[letter.n]]
    innocents = [f"{letter.n} {letter.place}" for letter in others]
    _check_inbox(facts, words)
    if facts.most_repeated is not None and repeated > facts.most_repeated:
        words.append(f"{repeated} letters or outside effects came again; {facts.most_repeated} may")
    if repeated < facts.least_repeated:
        words.append(f"{repeated} letters or outside effects came again; {facts.least_repeated} must")
    if facts.unpublished:
        words.append(f"{facts.unpublished} rows left in the outbox")
    if facts.unhandled:
        words.append(f"{facts.unhandled} messages left in queues")
    return Count(
        sent=len(committed),
        parked=len(facts.letters),
        lost=lost,
        doubled=doubled + wrongly_applied,
        ghosts=ghosts,
        disordered=disordered,
        innocents_parked=found("innocents parked", innocents) + _strangers(facts, words),
        misparked=found("parked where or why they must not be", misparked),
        handled=facts.handled,
        repeated=repeated,
        words=tuple(words),
    )


def _check_inbox(facts: Facts, words: list[str]) -> None:
    """Each row of the inbox was committed with one effect, and each effect with one row; a consumer without any row is no exception."""
    effects = {PLACED: facts.placed, APPLIED: facts.applied, LATER: facts.later, FOLLOWED: [n for _, _, n in facts.trail or ()]}
    for consumer in {**effects, **facts.handled}:
        rows, found = facts.handled.get(consumer, 0), len(set(effects.get(consumer, ())))
        if rows != found:
            words.append(f"{rows} rows in the inbox of {consumer} beside {found} effects")


def _strangers(facts: Facts, words: list[str]) -> int:
    """How many letters are missing or too many among those that had to come."""
    seen = Counter(letter.place for letter in facts.letters)
    wrong = {place: (wanted, seen[place]) for place, wanted in facts.strangers.items() if seen[place] != wanted}
    words.extend(f"{has} letters instead of {wanted} {place}" for place, (wanted, has) in wrong.items())
    return sum(abs(wanted - has) for wanted, has in wrong.values())


def _again(numbers: Sequence[int]) -> list[int]:
    return sorted(n for n, times in Counter(numbers).items() if times > 1)


def _disordered(trail: Sequence[tuple[str, int, int]]) -> Iterator[str]:
    """Whatever follows on a later one of its key; a number that is missing or there twice is told of elsewhere."""
    last: dict[str, int] = {}
    for key, seq, n in trail:
        if seq < last.get(key, 0):
            yield f"{n} ({key}: {seq} after {last[key]})"
        last[key] = max(seq, last.get(key, 0))
