"""Handlers: what a function's signature asks for, and what its decorator says, checked before the first message."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from orderbus._core.delivery import Batch, Delivery
from orderbus._core.event import Event, event_type
from orderbus._core.naming import place_of
from orderbus._core.policy import Retry
from orderbus._core.topology import QueueNeed
from orderbus.errors import UsageError

NAME = re.compile(r"[a-z][a-z0-9_.-]{0,99}")
GROUP = re.compile(r"[a-z][a-z0-9_-]{0,59}")
MOST_PREFETCH = 65_535
ORDERED_RETRY_LIMIT_S = 900.0
"""A key's retries block it inside the process: together they must stay below the broker's consumer timeout (30 min)."""
HOLD_LIMIT_S = 1_500.0
"""The broker closes a channel that holds a delivery for 30 min, and counts from the moment it sent it: the wait in the prefetch, too."""

Guard = Literal["inbox", "claims", "none"]
Source = Literal["event", "batch", "tx", "delivery"]
"""Where an argument comes from; a resource's argument has its type instead."""

DEFAULT_TIMEOUT_S = 60.0


class Options(msgspec.Struct, frozen=True):
    """What a decorator says of its handler. Times in seconds."""

    retry: Retry
    name: str | None = None
    ordered: bool = False
    concurrency: int = 10
    fuse: int = 1
    timeout_s: float = DEFAULT_TIMEOUT_S
    prefetch: int | None = None
    guard: Guard | None = None


class Handler(msgspec.Struct, frozen=True, dict=True):
    """A handler as its decorator left it. Its names are asked for at each message, and made once."""

    group: str
    function: Callable[..., Any]
    events: tuple[type[Event], ...]
    options: Options
    batch: bool = False

    @cached_property
    def topics(self) -> tuple[str, ...]:
        return tuple(event_type(event).topic for event in self.events)

    @cached_property
    def name(self) -> str:
        """The stable name by which the inbox knows it: its `name=`, else its topic. Renaming the function changes nothing."""
        return self.options.name or self.topics[0]

    @property
    def wants(self) -> str:
        """The type of its first parameter, as one writes it."""
        events = " | ".join(_type_name(event) for event in self.events)
        return f"Batch[{events}]" if self.batch else events

    @cached_property
    def consumer(self) -> str:
        return f"{self.group}.{self.name}"

    @property
    def queue(self) -> str:
        return f"{self.group}.ordered" if self.options.ordered else self.consumer

    @property
    def prefetch(self) -> int:
        """Enough to fill every worker twice, so that none waits for the network, as far as the broker waits for the last of them.

        What is ordered may all be of one key, and run one at a time: with more than the usual timeout it has no more than one worker
        would finish, but a unit for each worker.
        """
        options = self.options
        if options.prefetch is not None:
            return options.prefetch
        at_once = options.concurrency * options.fuse
        most = self.most_prefetch
        if options.ordered and options.timeout_s > DEFAULT_TIMEOUT_S:
            most = min(most, max(at_once, self._finished_in_time(options.fuse)))
        return min(max(2 * at_once, 16), most)

    @property
    def most_prefetch(self) -> int:
        """More could be held for longer than the broker allows, though every unit keeps to its timeout."""
        return self._finished_in_time(self.options.concurrency * self.options.fuse)

    def _finished_in_time(self, at_once: int) -> int:
        rounds = int(min(HOLD_LIMIT_S / self.options.timeout_s, MOST_PREFETCH))
        return min(rounds * at_once, MOST_PREFETCH)

    @property
    def place(self) -> str:
        """Its name, file and line, for errors."""
        return f"handler {place_of(self.function)}"


class Periodic(msgspec.Struct, frozen=True):
    """A function that runs every so many seconds while the bus is open."""

    function: Callable[..., Any]
    every_s: float
    timeout_s: float

    @property
    def place(self) -> str:
        return f"periodic {place_of(self.function)}"


class Plan(msgspec.Struct, frozen=True):
    """How to call a handler: where each argument comes from, and which events it says it returns."""

    arguments: tuple[Source | type, ...]
    emits: tuple[type[Event], ...]

    @property
    def needs_tx(self) -> bool:
        return "tx" in self.arguments or bool(self.emits)


def check_options(handler: Handler) -> None:
    """Raises UsageError for options that can't be kept, naming the handler, the option and the fix."""
    options = handler.options
    _check_async(handler)
    for event in handler.events:
        if not (isinstance(event, type) and issubclass(event, Event)):
            raise UsageError(
                f"{handler.place}: is registered for {event!r}, which is no event class; derive it from Event", code="OB201"
            )
    topics = handler.topics  # raises UsageError for an event without a topic
    if len(set(topics)) < len(topics):
        raise UsageError(f"{handler.place}: two of its events have the same topic: {', '.join(topics)}", code="OB309")
    if len(topics) > 1 and options.name is None:
        raise UsageError(
            f"{handler.place}: handles {len(topics)} topics in one queue; give it a stable name=, which names the queue",
            code="OB309",
        )
    if options.name is not None and not (isinstance(options.name, str) and NAME.fullmatch(options.name)):
        raise UsageError(
            f"{handler.place}: name={options.name!r} must be lower-case letters, digits, '.', '-' or '_'", code="OB310"
        )
    if handler.name == "ordered":
        raise UsageError(
            f"{handler.place}: the name 'ordered' is taken by the group's ordered queue; choose another name=", code="OB310"
        )
    if handler.name.endswith(".dlq"):
        raise UsageError(
            f"{handler.place}: the name {handler.name!r} ends like a dead letter queue; choose another name=", code="OB310"
        )
    for option, low, high in (("concurrency", 1, 1_000), ("fuse", 1, 10_000)):
        value = getattr(options, option)
        if not _is_whole(value) or not low <= value <= high:
            raise UsageError(f"{handler.place}: {option}={value!r} must be a whole number from {low} to {high}", code="OB311")
    if options.prefetch is not None and not (_is_whole(options.prefetch) and 1 <= options.prefetch <= MOST_PREFETCH):
        raise UsageError(
            f"{handler.place}: prefetch={options.prefetch!r} must be from 1 to {MOST_PREFETCH}; "
            f"without a bound, a backlog would fill the memory",
            code="OB311",
        )
    if not isinstance(options.timeout_s, (int, float)) or not 0 < options.timeout_s <= 1_200:
        raise UsageError(
            f"{handler.place}: timeout={options.timeout_s!r} must be more than 0 and at most 1200 seconds", code="OB311"
        )
    if not isinstance(options.retry, Retry):
        raise UsageError(
            f"{handler.place}: retry={options.retry!r} must be a Retry, such as Retry.exponential(attempts=5)", code="OB311"
        )
    if options.guard not in (None, "inbox", "claims", "none"):
        raise UsageError(f'{handler.place}: guard={options.guard!r} must be "inbox", "claims" or "none"', code="OB311")
    if handler.batch and options.ordered:
        raise UsageError(f"{handler.place}: a batch handler can't be ordered; use bus.on(…, ordered=True, fuse=N)", code="OB312")
    if options.ordered and options.retry.longest_s > ORDERED_RETRY_LIMIT_S:
        raise UsageError(
            f"{handler.place}: ordered retries block their key inside the process, so all waits together must stay "
            f"below {ORDERED_RETRY_LIMIT_S:g} s; this policy waits {options.retry.longest_s:g} s",
            code="OB313",
        )


def resolve(handler: Handler, tx_type: type, resources: Mapping[type, object]) -> Plan:
    """Read the signature. Raises UsageError naming the handler, the parameter and the fix; NameError for a forward reference."""
    hints = typing.get_type_hints(handler.function)
    parameters = list(inspect.signature(handler.function).parameters.values())
    events: Any = Union[handler.events]  # noqa: UP007 - of a tuple
    first = Batch[events] if handler.batch else events
    wanted = handler.wants
    if not parameters:
        raise UsageError(f"{handler.place}: takes no parameter; its first must be the event, `event: {wanted}`", code="OB302")
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(
                f"{handler.place}: parameter {parameter} can't be injected; use plain parameters with a type", code="OB303"
            )
        if parameter.name not in hints:
            raise UsageError(
                f"{handler.place}: parameter {parameter.name!r} has no type; write `{parameter.name}: {wanted}`, or Tx, …",
                code="OB303",
            )
    if hints[parameters[0].name] != first:
        raise UsageError(
            f"{handler.place}: its first parameter {parameters[0].name!r} is {_type_name(hints[parameters[0].name])}, but it is "
            f"registered for {wanted}; write `{parameters[0].name}: {wanted}`",
            code="OB302",
        )
    arguments: list[Source | type] = ["batch" if handler.batch else "event"]
    for parameter in parameters[1:]:
        arguments.append(_source(handler, parameter.name, hints[parameter.name], tx_type, resources))
    plan = Plan(tuple(arguments), _emits(handler, hints.get("return", NoneType)))
    if handler.options.guard == "claims" and plan.needs_tx:
        raise UsageError(
            f'{handler.place}: guard="claims" is for handlers that write to no database; drop Tx and the returned events',
            code="OB314",
        )
    return plan


def guard_kind(handler: Handler, plan: Plan, *, has_store: bool, has_claims: bool) -> Guard:
    """What keeps its effects from happening twice. Raises UsageError where what it takes is not there."""
    kind = handler.options.guard or ("inbox" if has_store else "claims")
    if not has_store and (plan.needs_tx or kind == "inbox"):
        raise UsageError(
            f"{handler.place}: needs a database for its Tx, its events or its inbox; set ORDERBUS_DATABASE_URL", code="OB403"
        )
    if kind == "none" and plan.needs_tx:
        raise UsageError(
            f'{handler.place}: guard="none" gives no transaction; drop Tx and the returned events, or the guard', code="OB314"
        )
    if kind == "claims" and not has_claims:
        raise UsageError(
            f"{handler.place}: nothing guards it against being handled twice; set ORDERBUS_REDIS_URL or "
            f'ORDERBUS_DATABASE_URL, or say guard="none"',
            code="OB404",
        )
    return kind


def events_of(function: Callable[..., Any]) -> tuple[type[Event], ...]:
    """The events of a batch handler whose decorator names none: those in `Batch[A | B]` of its first parameter.

    Raises UsageError that says what to write.
    """
    place = f"handler {place_of(function)}"
    advice = "write `batch: Batch[A | B]` with event classes that are defined above, or name the event in the decorator"
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise UsageError(
            f"{place}: its annotations name something that can't be found: {error}; {advice}", code="OB305"
        ) from error
    first = next((hints.get(name) for name in inspect.signature(function).parameters), None)
    if get_origin(first) is not Batch:
        raise UsageError(
            f"{place}: the decorator names no event, and its first parameter is {_type_name(first)}; {advice}", code="OB302"
        )
    (inner,) = get_args(first)
    return get_args(inner) if get_origin(inner) in (Union, UnionType) else (inner,)


def queue_needs(handlers: Sequence[Handler]) -> list[QueueNeed]:
    """The queues of these handlers: one for each name, and one that all ordered handlers share."""
    needs: dict[str, list[Handler]] = {}
    for handler in handlers:
        needs.setdefault(handler.queue, []).append(handler)
    return [
        QueueNeed(queue, tuple(sorted({topic for handler in group for topic in handler.topics})), group[0].options.ordered)
        for queue, group in needs.items()
    ]


def check_together(handler: Handler, others: Sequence[Handler]) -> None:
    """Raises UsageError where two handlers of a group can't be told apart."""
    for other in others:
        share_a_lane = handler.options.ordered and other.options.ordered and handler.topics == other.topics
        if handler.consumer != other.consumer and not share_a_lane:
            continue
        if share_a_lane:
            raise UsageError(
                f"{handler.place}: {other.place} of group {handler.group!r} already handles {handler.topics[0]!r} in order; "
                f"a group has one ordered handler for a topic",
                code="OB308",
            )
        raise UsageError(
            f"{handler.place}: {other.place} of group {handler.group!r} is already called {handler.name!r}; "
            f"give one of them a stable name of its own, such as name={handler.function.__name__!r}",
            code="OB308",
        )


def resolve_periodic(periodic: Periodic, tx_type: type, resources: Mapping[type, object]) -> Plan:
    """Read the signature of a periodic function: Tx and resources, by type. Raises UsageError naming it and the fix."""
    function = periodic.function
    _check_async(periodic)
    times = (periodic.every_s, periodic.timeout_s)
    if not all(isinstance(time, (int, float)) for time in times) or not (0.01 <= times[0] <= 86_400 and 0 < times[1] <= 3_600):
        raise UsageError(f"{periodic.place}: runs every 0.01 to 86,400 seconds, with a timeout of at most 3,600", code="OB311")
    hints = typing.get_type_hints(function)
    arguments: list[Source | type] = []
    for name in inspect.signature(function).parameters:
        if name not in hints:
            raise UsageError(
                f"{periodic.place}: parameter {name!r} has no type; write `{name}: Tx`, or a resource's type", code="OB303"
            )
        source = _source(periodic, name, hints[name], tx_type, resources)
        if source == "delivery":
            raise UsageError(
                f"{periodic.place}: parameter {name!r} is a Delivery, but nothing is delivered here; drop it", code="OB306"
            )
        arguments.append(source)
    return Plan(tuple(arguments), _emits(periodic, hints.get("return", NoneType)))


def _source(handler: Handler | Periodic, name: str, hint: Any, tx_type: type, resources: Mapping[type, object]) -> Source | type:
    if hint is tx_type:
        return "tx"
    if hint is Delivery:
        if isinstance(handler, Handler) and handler.batch:
            raise UsageError(f"{handler.place}: parameter {name!r}: a batch has many deliveries; use item.delivery", code="OB306")
        return "delivery"
    if isinstance(hint, type) and hint in resources:
        return hint
    known = ", ".join(["Tx", "Delivery", *sorted(kind.__name__ for kind in resources)])
    raise UsageError(
        f"{handler.place}: parameter {name!r} is {_type_name(hint)}, which nobody provides; use one of {known}, "
        f"or provide it by an async generator under @bus.resource",
        code="OB304",
    )


def _emits(handler: Handler | Periodic, hint: Any) -> tuple[type[Event], ...]:
    found: list[type[Event]] = []
    for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if part is None or part is NoneType:
            continue
        if isinstance(part, type) and issubclass(part, Event):
            if part is not Event:
                event_type(part)
            found.append(part)
        elif get_origin(part) in (list, tuple, Sequence):
            inner = [arg for arg in get_args(part) if arg is not Ellipsis]
            for arg in inner:
                found.extend(_emits(handler, arg))
        else:
            raise UsageError(
                f"{handler.place}: returns {_type_name(part)}; a handler returns None, an event, or a sequence of events",
                code="OB307",
            )
    return tuple(found)


def _check_async(owner: Handler | Periodic) -> None:
    function = owner.function
    if not (inspect.isfunction(function) or inspect.ismethod(function)) or not inspect.iscoroutinefunction(function):
        name = getattr(function, "__name__", "handle")
        raise UsageError(f"{owner.place}: must be an async function; write `async def {name}(…)`", code="OB301")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)
