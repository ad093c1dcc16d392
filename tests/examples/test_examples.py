"""Each example runs without a server, ends by itself, and prints what it is there to show."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import ROOT, run_program

EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's own, which it closes to other users: run by root, the embedded PostgreSQL is one of them."""
    with tempfile.TemporaryDirectory(prefix="orderbus-example-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def test_hello_hands_an_event_from_one_handler_to_the_next(folder: Path) -> None:
    assert run_program(ROOT / "examples" / "01_hello.py", folder) == "order 7 is confirmed\n"


def test_outbox_rolls_back_without_a_ghost_and_applies_each_payment_once(folder: Path) -> None:
    lines = run_program(ROOT / "examples" / "02_outbox.py", folder).splitlines()

    assert lines[0] == "order 13 was rolled back (changed our mind), and its event with it"
    assert lines[1].startswith("payments: [1, 2, 3], each once; tried again: 1, ")


def test_retry_tries_again_what_is_worth_it_and_parks_the_rest_with_its_reason(folder: Path) -> None:
    text = run_program(ROOT / "examples" / "03_retry_and_dlq.py", folder)

    assert "CardRefused       1         parked\nException         4         50 ms, 100 ms, 200 ms, parked\n" in text
    assert [text.count(f"order {number}: try ") for number in range(1, 6)] == [2, 2, 1, 1, 4]
    assert text.endswith("handled: 2, tried again: 5, parked: negative-amount, never-retried, retries-exhausted\n")


def test_ordered_keeps_each_key_in_order_over_its_retries_while_the_other_goes_on(folder: Path) -> None:
    lines = run_program(ROOT / "examples" / "04_ordered.py", folder).splitlines()

    assert [line for line in lines if line[0] == "A"] == [*["A: placing fails"] * 2, "A: placed", "A: cancelled"]
    assert [line for line in lines if line[0] == "B"] == ["B: placed", "B: cancelled"]
    assert lines.index("B: cancelled") < lines.index("A: placed")


def test_trio_runs_handlers_as_trio_does(folder: Path) -> None:
    lines = run_program(ROOT / "examples" / "05_trio.py", folder).splitlines()

    assert lines == ["order 1: box", "order 1: label", "order 2: box", "order 2: label", "parked: 1, a clean stop: True"]


def test_testing_waits_three_hours_at_once_and_passes_its_own_tests(folder: Path) -> None:
    lines = run_program(ROOT / "examples" / "06_testing.py", folder).splitlines()

    assert lines == [
        "passed: test_an_order_is_paid_once_however_often_it_arrives",
        "three retries took 3 hours of virtual time",
        "passed: test_a_gateway_that_is_down_for_three_hours_loses_no_order",
        "passed: test_a_negative_amount_is_parked_with_its_reason",
    ]


def test_simulate_finds_the_bug_of_the_careless_shop_and_none_in_the_other(folder: Path) -> None:
    lines = run_program(ROOT / "examples" / "07_simulate.py", folder).splitlines()

    assert lines[0].startswith("shop: 300 schedules with ")
    assert lines[0].endswith(": no promise broken")
    assert lines[1] == "careless_shop: a promise is broken:"
    assert lines[-1] == lines[2].replace("  invariant", "replayed: invariant")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_program_of_one_page(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 80
