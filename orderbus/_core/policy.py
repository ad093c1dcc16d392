"""What to do about a failed message: a table of rules, and one pure function that reads it."""

from __future__ import annotations

import math

import msgspec

from orderbus.errors import MessageError, TransientError, UnavailableError, UsageError

IN_PROCESS_LIMIT_S = 1.0
"""A shorter delay is waited out in the process; a longer one goes through the broker's retry ladder."""
LONGEST_DELAY_S = 30 * 86_400.0
MOST_ATTEMPTS = 1_000


class Park(Exception):
    """Raise it in a handler to send the message to the dead letters at once, with a reason for the person on call."""

    def __init__(self, reason: str) -> None:
        self.reason = str(reason)
        super().__init__(self.reason)


class RetryLater(Exception):
    """Raise it in a handler to have the message again after `delay_s` seconds, whatever the policy says.

    It counts as an attempt, and is parked as soon as the policy's attempts are used up unless `counted=False`.
    A delay of 1 s or more is rounded up to a step of the retry ladder (1, 2, 5, 10, 20, 30 s, 1, 2, 5, 10, 30 min, 1 h).
    In an ordered handler, whose key waits inside the process, it is at most 15 min.
    """

    def __init__(self, delay_s: float, *, counted: bool = True) -> None:
        _check_delay("RetryLater", delay_s)
        self.delay_s = delay_s
        self.counted = counted
        super().__init__(f"retry in {delay_s:g} s")


class Again(msgspec.Struct, frozen=True):
    """Try again after `delay_s`. `counted` says whether it uses up an attempt."""

    delay_s: float
    counted: bool = True

    @property
    def in_process(self) -> bool:
        return self.delay_s < IN_PROCESS_LIMIT_S


class Parked(msgspec.Struct, frozen=True):
    """Move it to the dead letters. `reason` is a short stable word or the handler's own."""

    reason: str


Decision = Again | Parked


class Rule(msgspec.Struct, frozen=True):
    """For these exceptions: wait `delays_s[n]` after failed attempt n + 1; park when the list is used up."""

    exceptions: tuple[type[BaseException], ...]
    delays_s: tuple[float, ...]


class Retry(msgspec.Struct, frozen=True):
    """An immutable retry policy: ordered rules per exception class; the first that matches decides.

    Examples:
        >>> print(Retry.exponential(first=0.2, limit=60, attempts=4).never(ValueError))
        exception         attempts  then wait
        Park              -         parked with the handler's reason
        RetryLater        -         as long as the handler says
        MessageError      1         parked
        UnavailableError  no limit  again with back-off, uncounted
        ValueError        1         parked
        Exception         4         200 ms, 400 ms, 800 ms, parked
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise UsageError(
                "Retry: a policy has at least one rule; begin with Retry.exponential(), fixed() or none()", code="OB315"
            )

    @classmethod
    def exponential(cls, *, first: float = 0.2, limit: float = 60.0, attempts: int = 8, factor: float = 2.0) -> Retry:
        """Wait `first` seconds, then `factor` times longer each time, at most `limit`; give up after `attempts` tries in all."""
        _check_attempts(attempts)
        _check_delay("first", first)
        _check_delay("limit", limit)
        if not 1.0 <= factor <= 100.0:
            raise UsageError(f"Retry.exponential: factor must be between 1 and 100, not {factor!r}", code="OB315")
        delays: list[float] = []
        delay = first
        for _ in range(attempts - 1):
            delays.append(min(delay, limit))
            delay = min(delay * factor, limit)
        return cls((Rule((Exception,), tuple(delays)),))

    @classmethod
    def fixed(cls, delay: float, *, attempts: int) -> Retry:
        """Wait `delay` seconds between tries; give up after `attempts` tries in all."""
        _check_attempts(attempts)
        _check_delay("delay", delay)
        return cls((Rule((Exception,), (float(delay),) * (attempts - 1)),))

    @classmethod
    def none(cls) -> Retry:
        """One try; a failure is parked."""
        return cls((Rule((Exception,), ()),))

    def on(self, *exceptions: type[BaseException], retry: Retry) -> Retry:
        """The same policy, with another schedule for these exceptions. Rules added first are looked at first."""
        _check_exceptions("on", exceptions)
        return Retry((*self.rules[:-1], Rule(exceptions, retry.rules[-1].delays_s), self.rules[-1]))

    def never(self, *exceptions: type[BaseException]) -> Retry:
        """The same policy, but these exceptions are parked at the first failure."""
        _check_exceptions("never", exceptions)
        return Retry((*self.rules[:-1], Rule(exceptions, ()), self.rules[-1]))

    def rule_for(self, error: BaseException) -> Rule:
        return next((rule for rule in self.rules if isinstance(error, rule.exceptions)), self.rules[-1])

    @property
    def longest_s(self) -> float:
        """The most time that all the waits of one schedule take together, in seconds."""
        return max(sum(rule.delays_s) for rule in self.rules)

    def __str__(self) -> str:
        rows = [
            ("exception", "attempts", "then wait"),
            ("Park", "-", "parked with the handler's reason"),
            ("RetryLater", "-", "as long as the handler says"),
            ("MessageError", "1", "parked"),
            ("UnavailableError", "no limit", "again with back-off, uncounted"),
        ]
        for rule in self.rules:
            names = ", ".join(exception.__name__ for exception in rule.exceptions)
            waits = [_delay_text(delay) for delay in rule.delays_s]
            rows.append((names, str(len(waits) + 1), ", ".join([*waits, "parked"])))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{name:<{widths[0]}}  {tries:<{widths[1]}}  {wait}" for name, tries, wait in rows)


def decide(policy: Retry, error: Exception, attempt: int) -> Decision:
    """What follows after try number `attempt` (1 for the first) ended with `error`. Pure: the whole policy is here.

    Orders of the handler come first, then what no policy can change (bad data is parked, a missing server is waited for),
    then the policy's own rules. An exception group that holds one exception is taken for that one: task groups make such.
    """
    error = bare(error)
    if isinstance(error, Park):
        return Parked(error.reason)
    if isinstance(error, RetryLater):
        if error.counted and attempt > len(policy.rules[-1].delays_s):
            return Parked("retries-exhausted")
        return Again(error.delay_s, counted=error.counted)
    if isinstance(error, MessageError):
        return Parked(error.reason)
    if isinstance(error, TransientError):
        return Again(0.0, counted=False)
    if isinstance(error, UnavailableError):
        return Again(backoff_s(attempt), counted=False)
    delays = policy.rule_for(error).delays_s
    if not delays:
        return Parked("never-retried" if len(policy.rules) > 1 else "failed")
    if attempt > len(delays):
        return Parked("retries-exhausted")
    return Again(delays[attempt - 1])


def bare(error: Exception) -> Exception:
    """An exception out of the groups of one that task groups have wrapped around it."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def backoff_s(failures: int, *, first_s: float = 0.1, limit_s: float = 5.0, jitter: float = 1.0) -> float:
    """How long to wait after the n-th failure in a row to reach a server. `jitter` is a random number of [0, 1]: full jitter above a half."""
    ceiling = min(limit_s, first_s * 2.0 ** min(max(failures - 1, 0), 30))
    return ceiling * (0.5 + 0.5 * jitter)


def _check_attempts(attempts: int) -> None:
    if not isinstance(attempts, int) or not 1 <= attempts <= MOST_ATTEMPTS:
        raise UsageError(f"Retry: attempts must be a whole number from 1 to {MOST_ATTEMPTS}, not {attempts!r}", code="OB315")


def _check_delay(name: str, delay_s: float) -> None:
    if not isinstance(delay_s, (int, float)) or not math.isfinite(delay_s) or not 0 <= delay_s <= LONGEST_DELAY_S:
        raise UsageError(f"{name}: a delay is a number of seconds from 0 to {LONGEST_DELAY_S:g}, not {delay_s!r}", code="OB315")


def _check_exceptions(method: str, exceptions: tuple[type[BaseException], ...]) -> None:
    if not exceptions:
        raise UsageError(f"Retry.{method}() needs at least one exception class", code="OB315")
    for exception in exceptions:
        if not (isinstance(exception, type) and issubclass(exception, Exception)):
            raise UsageError(f"Retry.{method}(): {exception!r} is not an exception class", code="OB315")


def _delay_text(delay_s: float) -> str:
    if delay_s < 1:
        return f"{delay_s * 1000:g} ms"
    return f"{delay_s:g} s" if delay_s < 60 else f"{delay_s / 60:g} min"


DEFAULT_RETRY = Retry.exponential(first=0.2, limit=60.0, attempts=8)
