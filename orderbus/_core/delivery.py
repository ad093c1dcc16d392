"""One delivery's way through a consumer: what a handler sees of it, and the states it may be in, as a table."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar
from uuid import UUID

import msgspec

from orderbus._core.event import Event
from orderbus._core.message import Headers
from orderbus._core.policy import Park, RetryLater
from orderbus.errors import InvariantError


class Delivery(msgspec.Struct, frozen=True):
    """What a handler may know of the message it handles. Ask for it by a parameter of this type."""

    id: UUID
    """The event's id: the same at every retry and replay. Pass it on to outside systems as their idempotency key."""
    topic: str
    key: str | None
    attempt: int
    """1 for the first try."""
    headers: Headers
    deadline: float
    """When the handler is cancelled, on the clock of `anyio.current_time()`."""


E_co = TypeVar("E_co", bound=Event, covariant=True)


class Item(Generic[E_co]):
    """One event of a batch. Unless the handler says otherwise, it succeeds when the handler returns."""

    __slots__ = ("delivery", "event", "outcome")

    def __init__(self, event: E_co, delivery: Delivery) -> None:
        self.event = event
        self.delivery = delivery
        self.outcome: Exception | None = None

    def park(self, reason: str) -> None:
        """Send this one to the dead letters; the others of the batch go on."""
        self.outcome = Park(reason)

    def retry(self, error: Exception | float) -> None:
        """Have this one again: after so many seconds, or as the policy says for this exception."""
        self.outcome = RetryLater(error) if isinstance(error, (int, float)) else error


class Batch(Generic[E_co]):
    """The events that an `on_batch` handler receives together: at least one, sorted by key."""

    __slots__ = ("items",)

    def __init__(self, items: Sequence[Item[E_co]]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Item[E_co]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def events(self) -> Sequence[E_co]:
        return [item.event for item in self.items]


class State(enum.Enum):
    """Where a delivery is. The last four are final: the broker has been told."""

    __hash__ = object.__hash__  # the enum's own is Python code, and every step looks into the table

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    LEAVING = "leaving"
    ACKED = "acked"
    RELEASED = "released"
    REJECTED = "rejected"
    DEAD_LETTERED = "dead-lettered"


class Step(enum.Enum):
    """What happens to a delivery."""

    __hash__ = object.__hash__

    START = "start"
    WAIT = "wait"
    """Its handler failed, and it is tried again in this process."""
    LEAVE = "leave"
    """It is being published to the retry ladder or to the dead letters; acked only once that is confirmed."""
    FINISH = "finish"
    GIVE_BACK = "give back"
    REJECT = "reject"
    DEAD_LETTER = "dead-letter"


TRANSITIONS: dict[tuple[State, Step], State] = {
    (State.QUEUED, Step.START): State.RUNNING,
    (State.QUEUED, Step.GIVE_BACK): State.RELEASED,
    (State.RUNNING, Step.FINISH): State.ACKED,
    (State.RUNNING, Step.WAIT): State.WAITING,
    (State.RUNNING, Step.LEAVE): State.LEAVING,
    (State.RUNNING, Step.GIVE_BACK): State.RELEASED,
    (State.WAITING, Step.START): State.RUNNING,
    (State.WAITING, Step.GIVE_BACK): State.RELEASED,
    (State.LEAVING, Step.FINISH): State.ACKED,
    (State.LEAVING, Step.GIVE_BACK): State.RELEASED,
    (State.LEAVING, Step.REJECT): State.REJECTED,
    (State.LEAVING, Step.DEAD_LETTER): State.DEAD_LETTERED,
}
"""Every step a delivery can take. What is not in the table is a bug: nothing is settled twice, nothing acked before it is safe."""


def step(state: State, taken: Step) -> State:
    """The state after a step. Raises InvariantError for one that the table does not have."""
    try:
        return TRANSITIONS[state, taken]
    except KeyError:
        raise InvariantError(f"a delivery that is {state.value} can't {taken.value}") from None
