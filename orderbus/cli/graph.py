"""Which events go from which groups to which: of one bus or of several, as data, as a table and as a Mermaid chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from rich import box
from rich.console import RenderableType
from rich.table import Table

from orderbus._core.event import Event, EventType, event_type
from orderbus._core.handler import Handler
from orderbus._runtime.bus import Bus
from orderbus.cli.events import consumed, returned


class Reader(msgspec.Struct, frozen=True):
    """A group that consumes an event, and the handlers that do."""

    group: str
    handlers: tuple[Handler, ...]


class Flow(msgspec.Struct, frozen=True):
    """One event class of one topic. `senders` are the groups whose functions say that they return it; `tx.emit` can't be seen."""

    event: type[Event]
    kind: EventType
    senders: tuple[Bus, ...]
    readers: tuple[Reader, ...]


def flows(buses: Sequence[Bus]) -> list[Flow]:
    """Every event that any of the buses consumes or returns, by topic."""
    events = dict.fromkeys(event for bus in buses for event in (*consumed(bus), *returned(bus)))
    found = [
        Flow(
            event,
            event_type(event),
            tuple(bus for bus in buses if event in returned(bus)),
            tuple(
                Reader(bus.group, handlers)
                for bus in buses
                if (handlers := tuple(handler for handler in bus.handlers if event in handler.events))
            ),
        )
        for event in events
    ]
    return sorted(found, key=lambda flow: (flow.kind.topic, flow.event.__name__))


def flow_table(buses: Sequence[Bus]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("from", "event", "to"):
        table.add_column(column, overflow="fold")
    for way in _ways(buses):
        table.add_row("\n".join(way.senders) or "-", "\n".join(way.event), "\n".join(way.readers) or "-")
    return table


def mermaid(buses: Sequence[Bus]) -> str:
    """A flowchart: groups are boxes, events are rounded; an arrow to a group is labelled with its handlers.

    https://mermaid.js.org/syntax/flowchart.html
    """
    return "\n".join(["flowchart LR", *(f"    {line}" for line in _lines(buses))])


def _lines(buses: Sequence[Bus]) -> Iterator[str]:
    groups = {bus.group: f"g{number}" for number, bus in enumerate(buses)}
    for group, node in groups.items():
        yield f"{node}[{_quoted(group)}]"
    for number, way in enumerate(_ways(buses)):
        yield f"e{number}([{_quoted(*way.event)}])"
        for sender in way.senders:
            yield f"{groups[sender]} --> e{number}"
        for reader, handlers in way.readers.items():
            names = _quoted(*(handler.function.__qualname__ for handler in handlers))
            yield f"e{number} -->|{names}| {groups[reader]}"


class _Way(msgspec.Struct):
    """One topic: whoever reads it gets it from all who send it, also where each group has a class of its own for it."""

    event: tuple[str, str]
    """The names of its classes, and the topic with their versions."""
    senders: dict[str, None]
    readers: dict[str, list[Handler]]


def _ways(buses: Sequence[Bus]) -> list[_Way]:
    by_topic: dict[str, list[Flow]] = {}
    for flow in flows(buses):
        by_topic.setdefault(flow.kind.topic, []).append(flow)
    found = []
    for topic, several in by_topic.items():
        names = ", ".join(dict.fromkeys(flow.event.__name__ for flow in several))
        versions = ", ".join(dict.fromkeys(f"v{flow.kind.version}" for flow in several))
        way = _Way((names, f"{topic} {versions}"), dict.fromkeys(bus.group for flow in several for bus in flow.senders), {})
        for reader in (reader for flow in several for reader in flow.readers):
            way.readers.setdefault(reader.group, []).extend(reader.handlers)
        found.append(way)
    return found


def _quoted(*lines: str) -> str:
    escaped = (line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;") for line in lines)
    return f'"{"<br>".join(escaped)}"'
