"""Options that several verbs share, each group said once: a dataclass whose fields are the options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from orderbus._core.parked import Wanted
from orderbus._runtime.looking import MOST_HELD
from orderbus.cli.parsing import parse_header, parse_rate, parse_time
from orderbus.errors import UsageError

Hold = Annotated[
    int,
    typer.Option(
        min=1,
        max=MOST_HELD,
        help="How many letters to hold in memory to see those behind them. Lower it only where letters are very large: "
        "fewer than an earlier look has held come back behind the rest of those.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one line for each thing.")]
All = Annotated[bool, typer.Option("--all", help="All of them, without any filter.")]
Most = Annotated[int | None, typer.Option(min=1, help="The most letters of each queue, the oldest first.")]
Rate = Annotated[float | None, typer.Option(parser=parse_rate, metavar="N/s", help="How many letters a second, such as 20/s.")]


@dataclass(frozen=True, kw_only=True)
class Queues:
    """Where to look."""

    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODULE:BUS|QUEUE", help="A bus, for the dead letters of all its queues, or a queue's name."),
    ] = None
    queue: Annotated[
        list[str] | None,
        typer.Option("--queue", help="A queue's name, with .dlq or without; `ob.lost` keeps what no queue took."),
    ] = None

    @property
    def named(self) -> list[str]:
        return [*(self.targets or ()), *(self.queue or ())]


@dataclass(frozen=True, kw_only=True)
class LetterFilter:
    """Which letters; each option may be given more than once. The most that are held to find them belongs to the question."""

    reason: Annotated[list[str] | None, typer.Option("--reason", help="Only with this reason; `*` and `?` match anything.")] = (
        None
    )
    error: Annotated[list[str] | None, typer.Option("--error", help="Only after this exception, by its class name.")] = None
    handler: Annotated[
        list[str] | None, typer.Option("--handler", help="Only of this handler, such as payment.orders.placed.")
    ] = None
    event_id: Annotated[list[str] | None, typer.Option("--id", help="Only this event.")] = None
    key: Annotated[list[str] | None, typer.Option("--key", help="Only of this key.")] = None
    header: Annotated[
        list[Any] | None,
        typer.Option("--header", parser=parse_header, metavar="NAME=VALUE", help="Only with this header of the message's own."),
    ] = None
    since: Annotated[
        float | None,
        typer.Option(parser=parse_time, metavar="TIME", help="Only parked since: 15m, 2h, 3d, or 2026-01-31T12:00."),
    ] = None
    before: Annotated[float | None, typer.Option(parser=parse_time, metavar="TIME", help="Only parked before.")] = None
    hold: Hold = MOST_HELD

    @property
    def wanted(self) -> Wanted:
        return Wanted(
            reasons=tuple(self.reason or ()),
            errors=tuple(self.error or ()),
            handlers=tuple(self.handler or ()),
            ids=tuple(self.event_id or ()),
            keys=tuple(self.key or ()),
            headers=tuple(self.header or ()),
            since_s=self.since,
            before_s=self.before,
        )

    def chosen(self, everything: bool) -> Wanted:
        """What is wanted, by a filter or by `--all`. Raises UsageError for neither and for both."""
        if (self.wanted == Wanted()) is not everything:
            raise UsageError(
                "say which letters, by --reason, --error, --handler, --id, --key, --header, --since or --before; "
                "or --all, without any",
                code="OB610",
            )
        return self.wanted


@dataclass(frozen=True, kw_only=True)
class Acting:
    """What every verb that changes something takes."""

    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask. Needed where there is no terminal to ask at.")] = False
    audit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append the audit lines, which go to stderr, to this file, too.")
    ] = None


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of its parameters that are dataclasses: typer reads the signature made here."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        of_fields = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=of_fields[field.name]
                )
            )

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped
