"""The event classes that a bus names: those its handlers consume, and those that its functions say they return."""

from __future__ import annotations

from orderbus._core.event import Event, event_type
from orderbus._core.naming import nearest
from orderbus._runtime.bus import Bus
from orderbus.errors import UsageError


def consumed(bus: Bus) -> list[type[Event]]:
    return list(dict.fromkeys(event for handler in bus.handlers for event in handler.events))


def returned(bus: Bus) -> list[type[Event]]:
    """What handlers and periodic functions return by their annotations; what code emits by `tx.emit` can't be seen from outside."""
    plans = [plan for _, plan in [*bus.plans(), *bus._periodic_plans()]]
    return list(dict.fromkeys(event for plan in plans for event in plan.emits if event is not Event))


def event_of(bus: Bus, topic: str) -> type[Event]:
    """The class for a topic. Raises UsageError with the likely topic, or all of them."""
    known: dict[str, type[Event]] = {}
    for event in (*consumed(bus), *returned(bus)):
        known.setdefault(event_type(event).topic, event)
    if topic in known:
        return known[topic]
    if not known:
        raise UsageError(f"the bus {bus.group!r} names no event: its handlers consume none and return none", code="OB614")
    near = nearest(topic, known)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(known))}"
    raise UsageError(f"the bus {bus.group!r} neither consumes nor returns an event of the topic {topic!r}; {hint}", code="OB614")
