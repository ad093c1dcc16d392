"""Retry policies: what follows a failure is one pure function over one table."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from orderbus import HandlerTimeout, MessageError, Park, Retry, RetryLater, TransientError, UnavailableError, UsageError
from orderbus._core.policy import (
    DEFAULT_RETRY,
    IN_PROCESS_LIMIT_S,
    LONGEST_DELAY_S,
    Again,
    Parked,
    Rule,
    backoff_s,
    bare,
    decide,
)


class CardRefused(Exception):
    pass


class CardStolen(CardRefused):
    pass


policies = st.builds(
    Retry.exponential,
    first=st.floats(0, LONGEST_DELAY_S),
    limit=st.floats(0, LONGEST_DELAY_S),
    attempts=st.integers(1, 1000),
    factor=st.floats(1, 100),
)
attempts = st.integers(1, 2000)


@given(policies, attempts)
def test_every_failure_is_retried_with_growing_bounded_delays_and_then_parked(policy: Retry, attempt: int) -> None:
    decision = decide(policy, ValueError(), attempt)
    delays = policy.rules[-1].delays_s

    if attempt <= len(delays):
        assert decision == Again(delays[attempt - 1], counted=True)
        assert 0 <= delays[attempt - 1] <= LONGEST_DELAY_S
        assert attempt == 1 or delays[attempt - 1] >= delays[attempt - 2]
    else:
        assert isinstance(decision, Parked)


def test_each_attempt_is_followed_by_its_own_delay() -> None:
    policy = Retry.exponential(first=1, limit=60, attempts=4, factor=3)

    assert [decide(policy, ValueError(), attempt) for attempt in (1, 2, 3)] == [Again(1), Again(3), Again(9)]


@given(policies, attempts, st.text())
def test_park_wins_over_every_policy(policy: Retry, attempt: int, reason: str) -> None:
    assert decide(policy.never(Park), Park(reason), attempt) == Parked(reason)


@given(policies, attempts, st.floats(0, LONGEST_DELAY_S))
def test_retry_later_has_its_own_delay_and_counts_unless_it_says_otherwise(policy: Retry, attempt: int, delay: float) -> None:
    used_up = attempt > len(policy.rules[-1].delays_s)

    assert decide(policy, RetryLater(delay), attempt) == (Parked("retries-exhausted") if used_up else Again(delay, counted=True))
    assert decide(policy, RetryLater(delay, counted=False), attempt) == Again(delay, counted=False)


@given(policies, attempts)
def test_bad_data_is_parked_with_its_own_reason_whatever_the_policy_says(policy: Retry, attempt: int) -> None:
    assert decide(policy.on(MessageError, retry=policy), MessageError("undecodable", "…"), attempt) == Parked("undecodable")


@given(policies, attempts)
def test_a_missing_server_is_waited_for_for_ever_and_never_counted(policy: Retry, attempt: int) -> None:
    decision = decide(policy.never(UnavailableError), UnavailableError(), attempt)

    assert isinstance(decision, Again)
    assert decision.counted is False
    assert 0 < decision.delay_s <= 5


@given(policies, attempts)
def test_a_deadlock_is_run_again_at_once_and_never_counted(policy: Retry, attempt: int) -> None:
    assert decide(policy, TransientError(), attempt) == Again(0.0, counted=False)


@given(policies, attempts)
def test_never_parks_at_the_first_failure_and_so_for_subclasses(policy: Retry, attempt: int) -> None:
    policy = policy.never(CardRefused)

    assert decide(policy, CardRefused(), attempt) == Parked("never-retried")
    assert decide(policy, CardStolen(), attempt) == Parked("never-retried")
    assert decide(policy, ValueError(), 1) == decide(policy.never(KeyError), ValueError(), 1)


def test_the_first_rule_that_matches_decides() -> None:
    quick, slow = Retry.fixed(0.1, attempts=2), Retry.fixed(10, attempts=3)
    policy = Retry.none().on(CardStolen, retry=slow).on(CardRefused, retry=quick).never(Exception)

    assert decide(policy, CardStolen(), 1) == Again(10)
    assert decide(policy, CardRefused(), 1) == Again(0.1)
    assert decide(policy, CardRefused(), 2) == Parked("retries-exhausted")
    assert decide(policy, HandlerTimeout(), 1) == Parked("never-retried")


def test_a_policy_can_not_be_changed_only_derived_from() -> None:
    policy = Retry.fixed(1, attempts=2)
    derived = policy.never(KeyError)

    assert decide(policy, KeyError(), 1) == Again(1.0)
    assert decide(derived, KeyError(), 1) == Parked("never-retried")
    with pytest.raises(AttributeError):
        policy.rules = ()


def test_a_single_try_that_fails_is_parked_as_failed() -> None:
    assert decide(Retry.none(), ValueError(), 1) == Parked("failed")


@given(st.integers(1, 5))
def test_an_exception_group_of_one_counts_as_that_one(depth: int) -> None:
    error: Exception = Park("why")
    for _ in range(depth):
        error = ExceptionGroup("tasks", [error])

    assert decide(DEFAULT_RETRY, error, 1) == Parked("why")
    assert isinstance(bare(error), Park)


def test_an_exception_group_of_several_is_an_exception_of_its_own() -> None:
    group = ExceptionGroup("tasks", [Park("one"), Park("two")])

    assert bare(group) is group
    assert decide(Retry.fixed(3, attempts=2), group, 1) == Again(3.0)


@pytest.mark.parametrize(("delay", "is_in_process"), [(0, True), (0.999, True), (IN_PROCESS_LIMIT_S, False), (3600, False)])
def test_delays_below_a_second_are_waited_out_in_the_process(delay: float, is_in_process: bool) -> None:
    assert Again(delay).in_process is is_in_process


HEAD = """\
exception         attempts  then wait
Park              -         parked with the handler's reason
RetryLater        -         as long as the handler says
MessageError      1         parked
UnavailableError  no limit  again with back-off, uncounted
"""


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda: Retry.none(), "Exception         1         parked"),
        (lambda: Retry.fixed(90, attempts=3), "Exception         3         1.5 min, 1.5 min, parked"),
        (lambda: Retry.fixed(60, attempts=2), "Exception         2         1 min, parked"),
        (lambda: Retry.fixed(59.5, attempts=2), "Exception         2         59.5 s, parked"),
        (
            lambda: Retry.exponential(first=0.05, limit=1, attempts=4, factor=10),
            "Exception         4         50 ms, 500 ms, 1 s, parked",
        ),
        (
            lambda: Retry.none().on(KeyError, retry=Retry.fixed(2, attempts=2)),
            "KeyError          2         2 s, parked\nException         1         parked",
        ),
    ],
)
def test_a_policy_prints_itself_as_the_table_it_is(make: Callable[[], Retry], rows: str) -> None:
    assert str(make()) == HEAD + rows


def test_the_table_is_as_wide_as_its_longest_name() -> None:
    lines = str(Retry.none().never(CardRefused, KeyError)).splitlines()

    assert lines[0] == "exception              attempts  then wait"
    assert lines[-2:] == ["CardRefused, KeyError  1         parked", "Exception              1         parked"]


def test_the_default_policy_is_what_its_documentation_says() -> None:
    assert str(DEFAULT_RETRY).splitlines()[-1].split(maxsplit=2)[2] == (
        "200 ms, 400 ms, 800 ms, 1.6 s, 3.2 s, 6.4 s, 12.8 s, parked"
    )


ATTEMPTS = "Retry: attempts must be a whole number from 1 to 1000, not "
FACTOR = "Retry.exponential: factor must be between 1 and 100, not "
DELAY = "a delay is a number of seconds from 0 to 2.592e+06, not "


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Retry.exponential(attempts=0), ATTEMPTS + "0"),
        (lambda: Retry.exponential(attempts=1001), ATTEMPTS + "1001"),
        (lambda: Retry.exponential(attempts=1.5), ATTEMPTS + "1.5"),
        (lambda: Retry.exponential(first=-1), f"first: {DELAY}-1"),
        (lambda: Retry.exponential(first=math.nan), f"first: {DELAY}nan"),
        (lambda: Retry.exponential(limit=math.inf), f"limit: {DELAY}inf"),
        (lambda: Retry.exponential(limit=LONGEST_DELAY_S + 1), f"limit: {DELAY}2592001.0"),
        (lambda: Retry.exponential(factor=0.5), FACTOR + "0.5"),
        (lambda: Retry.exponential(factor=100.5), FACTOR + "100.5"),
        (lambda: Retry.exponential(factor=math.nan), FACTOR + "nan"),
        (lambda: Retry.fixed("1", attempts=2), f"delay: {DELAY}'1'"),
        (lambda: Retry.fixed(1, attempts="2"), ATTEMPTS + "'2'"),
        (lambda: Retry.none().never(), "Retry.never() needs at least one exception class"),
        (lambda: Retry.none().never(5), "Retry.never(): 5 is not an exception class"),
        (lambda: Retry.none().never(BaseException), "Retry.never(): <class 'BaseException'> is not an exception class"),
        (lambda: Retry.none().on(retry=Retry.none()), "Retry.on() needs at least one exception class"),
        (
            lambda: Retry.none().on(KeyboardInterrupt, retry=Retry.none()),
            "Retry.on(): <class 'KeyboardInterrupt'> is not an exception class",
        ),
        (lambda: Retry(()), "Retry: a policy has at least one rule; begin with Retry.exponential(), fixed() or none()"),
        (lambda: RetryLater(-1), f"RetryLater: {DELAY}-1"),
        (lambda: RetryLater(math.inf), f"RetryLater: {DELAY}inf"),
        (lambda: RetryLater(None), f"RetryLater: {DELAY}None"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_when_it_is_written(make: Callable[[], object], text: str) -> None:
    with pytest.raises(UsageError) as raised:
        make()

    assert (raised.value.text, raised.value.code) == (text, "OB315")


def test_the_edges_of_what_makes_sense_are_taken() -> None:
    policy = Retry.exponential(first=0, limit=LONGEST_DELAY_S, attempts=1000, factor=100)

    assert len(policy.rules[0].delays_s) == 999
    assert Retry.exponential(attempts=1) == Retry.fixed(5, attempts=1) == Retry.none()
    assert Retry.exponential(factor=1).rules[0].delays_s == (0.2,) * 7


def test_orders_of_a_handler_say_what_they_are_where_they_are_logged() -> None:
    assert str(Park("no stock")) == "no stock"
    assert str(RetryLater(5)) == "retry in 5 s"


def test_the_last_attempt_of_a_policy_may_still_ask_for_another() -> None:
    policy = Retry.fixed(1, attempts=3)

    assert decide(policy, RetryLater(5), 2) == Again(5)
    assert decide(policy, RetryLater(5), 3) == Parked("retries-exhausted")
    assert decide(policy, ValueError(), 2) == Again(1.0)
    assert decide(policy, ValueError(), 3) == Parked("retries-exhausted")


def test_what_no_rule_names_goes_by_the_last() -> None:
    policy = Retry((Rule((KeyError,), ()), Rule((LookupError,), (1.0,))))

    assert policy.rule_for(ValueError()) is policy.rules[1]
    assert decide(policy, ValueError(), 1) == Again(1.0)
    assert policy.longest_s == 1.0


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_back_off_is_bounded_and_never_nothing(failures: int, jitter: float) -> None:
    assert 0.05 <= backoff_s(failures, jitter=jitter) <= 5
    assert backoff_s(failures, jitter=jitter) <= backoff_s(failures, jitter=1)


def test_back_off_doubles_up_to_its_limit() -> None:
    assert [backoff_s(failures) for failures in (1, 2, 3, 4)] == [0.1, 0.2, 0.4, 0.8]
    assert backoff_s(1000) == 5
