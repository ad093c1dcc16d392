"""Assertions on what became of the events of a test: sentences that return what they have found, or say what there was instead."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import msgspec

from orderbus import Bus, Event, UsageError
from orderbus._core.codec import BodyDecoder
from orderbus._core.event import event_type
from orderbus._core.handler import Handler
from orderbus._core.naming import nearest
from orderbus._core.parked import Parked
from orderbus.errors import MessageError
from orderbus.testing.record import Cost, Emission, Record, Try
from orderbus.testing.servers import Servers
from orderbus.testing.telling import Line, check_fields, claim, differences, errors_of

__all__ = ["Assertions"]

E = TypeVar("E", bound=Event)
Function = Callable[..., Any]
OTHER = 1_000
"""The distance of what is of another kind."""


class Assertions:
    """Each takes what it is about (an event class, or a handler: its function or its name), `times` (how often; at least once,
    unless given) and fields of the event. Each returns what it has found, and raises AssertionError where that is too few or
    too many, UsageError for a field or a handler that does not exist.
    """

    _record: Record
    _servers: Servers

    def __init__(self, buses: Sequence[Bus]) -> None:
        self._buses = buses
        self._handlers = [handler for bus in buses for handler in bus.handlers]

    @overload
    def emitted(self, kind: type[E], /, *, times: int | None = None, **fields: object) -> list[E]: ...

    @overload
    def emitted(self, kind: None = None, /, *, times: int | None = None) -> list[Event]: ...

    def emitted(self, kind: type[Event] | None = None, /, *, times: int | None = None, **fields: object) -> Sequence[Event]:
        """The events that were emitted by committed transactions, or published directly; not those that the test published.

        They are read from what was sent, as a consumer reads them.
        """
        if kind is None:
            there = [Line(0, self._shown(one)) for one in self._record.emissions]
            claim(self._record.emissions, times, "event", "was emitted", there, errors_of(self._record.tries))
            return [event for one in self._record.emissions if (event := self._read(one)) is not None]
        topic, decoder = event_type(kind).topic, BodyDecoder(kind, limit_bytes=1 << 30)
        check_fields(kind, fields)
        found: list[Event] = []
        there = []
        for one in self._record.emissions:
            if one.topic != topic:
                there.append(Line(OTHER, self._shown(one)))
                continue
            try:
                event = decoder.decode(one.body, one.content_type)
            except MessageError as error:
                there.append(Line(OTHER, f"{topic}, but no {kind.__name__} can be read from it: {error}"))
                continue
            wrong = differences(event, fields)
            there.append(Line(len(wrong), f"{event!r}{_but(wrong)}"))
            found += [] if wrong else [event]
        return claim(found, times, _with(kind.__name__, fields), "was emitted", there, errors_of(self._record.tries))

    def handled(
        self, what: type[Event] | Function | str | None = None, /, *, times: int | None = None, **fields: object
    ) -> list[Try]:
        """The tries that succeeded. An event that arrived again, and was recognised, was handled once."""
        return self._tried("handled", what, times, fields)

    def retried(
        self, what: type[Event] | Function | str | None = None, /, *, times: int | None = None, **fields: object
    ) -> list[Try]:
        """The tries that failed and were followed by another."""
        return self._tried("retried", what, times, fields)

    def parked(
        self,
        what: type[Event] | Function | str | None = None,
        /,
        *,
        reason: str | None = None,
        times: int | None = None,
        **fields: object,
    ) -> list[Parked]:
        """The dead letters, whose `reason` is a stable word (`retries-exhausted`, `undecodable`, …) or the handler's own."""
        about = self._about(what, fields)
        found: list[Parked] = []
        there: list[Line] = []
        for letter in self._servers.queues.parked():
            shown = f"{self._event_of(letter)!r}: {letter.reason}"
            if not about.covers(letter.topic, letter.handler):
                there.append(Line(OTHER, shown))
                continue
            wrong = [] if reason in (None, letter.reason) else [f"its reason is {letter.reason!r}, not {reason!r}"]
            event = self._event_of(letter)
            wrong += differences(event, fields) if isinstance(event, Event) else ["unreadable"] if fields else []
            if not wrong:
                found.append(letter)
            there.append(Line(len(wrong), f"{shown}{_but(wrong)}"))
        because = "" if reason is None else f" for {reason!r}"
        return claim(found, times, _with(about.name, fields), f"was parked{because}", there, errors_of(self._record.tries))

    def nothing_emitted(self) -> None:
        """No event was emitted or published but by the test."""
        self.emitted(times=0)

    def nothing_parked(self) -> None:
        """There are no dead letters."""
        self.parked(times=0)

    def cost(self, handler: Function | str, /, *, statements: float | None = None, emitted: float | None = None) -> Cost:
        """What a handler cost for each message that it handled: SQL statements through its `tx`, and events.

        With `statements` or `emitted`, raises AssertionError where it is another number, with the statements. It also does so where
        the handler has handled nothing. Statements of its own `tx.connection` are not seen.
        """
        name, handlers = self._named(handler)
        cost = self._record.cost([one.consumer for one in handlers])
        if cost is None:
            lines = [f"{name} has handled nothing, so it has no cost", *errors_of(self._record.tries)]
            raise AssertionError("\n".join(lines))
        for what, wanted in (("statements", statements), ("emitted", emitted)):
            if wanted is not None and (had := getattr(cost, what)) != wanted:
                words = "statements" if what == "statements" else "events"
                raise AssertionError(f"{name} takes {had:g} {words} a message, not {wanted:g}\n  {cost}")
        return cost

    def _tried(self, outcome: str, what: Any, times: int | None, fields: Mapping[str, object]) -> list[Try]:
        about = self._about(what, fields)
        found: list[Try] = []
        there: list[Line] = []
        for one in self._record.tries:
            wrong = differences(one.event, fields) if about.covers(event_type(type(one.event)).topic, one.handler) else None
            became = f"{one.event!r} {one.outcome} by {one.handler} at try {one.attempt}"
            if one.error is not None:
                became += f" after {type(one.error).__name__}"
            if wrong is None:
                there.append(Line(OTHER, became))
                continue
            if not wrong and one.outcome == outcome:
                found.append(one)
            there.append(Line(2 * len(wrong) + (one.outcome != outcome), f"{became}{_but(wrong)}"))
        return claim(found, times, _with(about.name, fields), f"was {outcome}", there, errors_of(self._record.tries))

    def _about(self, what: type[Event] | Function | str | None, fields: Mapping[str, object]) -> _About:
        if what is None:
            if fields:
                raise UsageError(
                    f"{', '.join(fields)}: fields need the event class or the handler that they are of", code="OB908"
                )
            return _About("event")
        if inspect.isclass(what) and issubclass(what, Event):
            check_fields(what, fields)
            return _About(what.__name__, topic=event_type(what).topic)
        name, handlers = self._named(what)
        for field in fields:
            kinds = [kind for one in handlers for kind in one.events]
            if not any(field in kind.__struct_fields__ for kind in kinds):
                check_fields(kinds[0], {field: None})
        return _About(f"event of {name}", handlers=frozenset(one.consumer for one in handlers))

    def _named(self, what: Function | str) -> tuple[str, list[Handler]]:
        handlers = [one for one in self._handlers if what is one.function or what in (one.consumer, one.name)]
        if not handlers:
            raise UsageError(_unknown(what, self._handlers), code="OB908")
        return what if isinstance(what, str) else getattr(what, "__name__", repr(what)), handlers

    def _read(self, one: Emission | Parked) -> Event | None:
        """As a class of that topic, those of the handlers first; None where there is none, or it can't be read."""
        kinds = [kind for handler in self._handlers for kind in handler.events]
        for kind in itertools.chain(kinds, _classes(Event)):
            if event_type(kind).topic == one.topic:
                try:
                    event: Event = BodyDecoder(kind, limit_bytes=1 << 30).decode(one.body, one.content_type)
                except MessageError:
                    continue
                return event
        return None

    def _event_of(self, letter: Parked) -> Event | bytes:
        return self._read(letter) or letter.body

    def _shown(self, one: Emission) -> str:
        event = self._read(one)
        return repr(event) if event is not None else f"{one.topic} {one.body.decode(errors='replace')}"


class _About(msgspec.Struct, frozen=True):
    """What an assertion is about, and how it is called there."""

    name: str
    topic: str | None = None
    handlers: frozenset[str] | None = None

    def covers(self, topic: str | None, handler: str | None) -> bool:
        return self.topic in (None, topic) and (self.handlers is None or handler in self.handlers)


def _classes(kind: type[Event]) -> Iterator[type[Event]]:
    """All event classes of this process that have a topic."""
    for inner in kind.__subclasses__():
        if hasattr(inner, "__event_type__"):
            yield inner
        yield from _classes(inner)


def _but(wrong: Sequence[str]) -> str:
    return f": {', '.join(wrong)}" if wrong else ""


def _with(name: str, fields: Mapping[str, object]) -> str:
    return name if not fields else f"{name} with {', '.join(f'{field}={value!r}' for field, value in fields.items())}"


def _unknown(what: object, handlers: Sequence[Handler]) -> str:
    names = [one.consumer for one in handlers]
    near = nearest(str(what), [*names, *(one.name for one in handlers)])
    advice = f"did you mean {near!r}?" if near else f"there is {', '.join(names) or 'none'}"
    return f"{what!r} is no event class, and no handler of this TestBus; {advice}"
