"""docs/telemetry.md as data, and how what a run emits differs from it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tests.faults.world import ROOT

__all__ = ["Entry", "attributes_of_spans", "differences", "listed_metrics", "listed_spans", "row_of_span"]

DATABASE, REQUEST = "BEGIN", "<method> <route>"
"""The rows of spans that are not found by how their names begin."""
SYSTEMS = {"messaging": "messaging.system", "db": "db.system.name"}
ATTRIBUTE = re.compile(r"`([a-z]+(?:\.[a-z_]+)+)`")


class Entry(NamedTuple):
    """A metric, or all spans of a row."""

    kind: str
    unit: str
    """Spans have none."""
    attributes: frozenset[str]

    def __or__(self, other: Entry) -> Entry:
        """The same one seen again, perhaps with other attributes."""
        assert (self.kind, self.unit) == (other.kind, other.unit), f"one name, two meanings: {self}, {other}"
        return self._replace(attributes=self.attributes | other.attributes)


def listed_metrics() -> dict[str, Entry]:
    found = {}
    for name, kind, unit, attributes, _ in _rows(_parts()[1], columns=5):
        found[_code(name)] = Entry(kind, unit, frozenset(ATTRIBUTE.findall(attributes)))
    return found


def listed_spans() -> dict[str, Entry]:
    """By the first name of each row. Which system it was is said in the table's heading, for all rows that have a system."""
    found = {}
    for names, kind, _, attributes in _rows(_parts()[0], columns=4):
        own = frozenset(ATTRIBUTE.findall(attributes))
        found[_code(names)] = Entry(
            kind, "", own | {SYSTEMS[begin] for one in own if (begin := one.partition(".")[0]) in SYSTEMS}
        )
    return found


def attributes_of_spans() -> set[str]:
    """Every attribute that the page names before it comes to metrics."""
    return set(ATTRIBUTE.findall(_parts()[0]))


def row_of_span(name: str, attributes: Mapping[str, object]) -> str:
    """Which row a span belongs to; its own name where there is none."""
    if "db.system.name" in attributes:
        return DATABASE
    if "http.route" in attributes:
        return REQUEST
    begins = {row.partition("<")[0]: row for row in listed_spans() if row not in (DATABASE, REQUEST)}
    return begins[max(fitting, key=len)] if (fitting := [begin for begin in begins if name.startswith(begin)]) else name


def differences(listed: Mapping[str, Entry], seen: Mapping[str, Entry], not_provoked: Mapping[str, str]) -> list[str]:
    """Both ways. `not_provoked` has what a run does not bring about, each with the reason: a name, or `name: attribute`."""
    found = [f"{name} is emitted and not listed" for name in sorted(seen.keys() - listed.keys())]
    found += [f"{name} is listed and not emitted" for name in sorted(listed.keys() - seen.keys() - not_provoked.keys())]
    for name in sorted(listed.keys() & seen.keys()):
        (kind, unit, attributes), (is_kind, is_unit, has) = listed[name], seen[name]
        if (kind, unit) != (is_kind, is_unit):
            found.append(f"{name} is a {is_kind} {is_unit}, and listed as a {kind} {unit}")
        found += [f"{name}: {one} is emitted and not listed" for one in sorted(has - attributes)]
        found += [
            f"{name}: {one} is listed and not emitted" for one in sorted(attributes - has) if f"{name}: {one}" not in not_provoked
        ]
    known = {*listed, *(f"{name}: {one}" for name, entry in listed.items() for one in entry.attributes)}
    return found + [f"{one} is not listed, and need not be excused" for one in sorted(not_provoked.keys() - known)]


@functools.cache
def _parts() -> tuple[str, str]:
    of_spans, _, of_metrics = (ROOT / "docs" / "telemetry.md").read_text().partition("\n## Metrics\n")
    return of_spans, of_metrics


def _rows(text: str, *, columns: int) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == columns, line
            yield cells


def _code(cell: str) -> str:
    """The first code of a cell."""
    return cell.split("`")[1]
