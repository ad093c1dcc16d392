"""A short run of the fuzzer; `python -m tests.rabbitmq.fuzz` has longer ones."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from tests.rabbitmq import fuzz


def test_half_a_million_bytes_do_no_harm_and_meet_every_end() -> None:
    report = fuzz.run(seed=0, wanted_bytes=500_000)
    assert report.bytes >= 500_000
    ends = {"messages", "malformed-properties", "body-too-large", "ended in an error"}
    kinds = {"valid", "damaged", "noisy payloads", "noisy properties", "noise"}
    assert ends | kinds <= set(report.outcomes)


def test_no_bomb_fills_the_memory() -> None:
    outcomes: Counter[str] = Counter()
    with fuzz.traced():
        sent, _ = fuzz.bomb_case(Random(0), outcomes)
    assert outcomes["bombs"] == 15
    assert sent > 10 * fuzz.BOMB_BYTES


def test_a_seed_names_its_bytes() -> None:
    first, again, other = (fuzz.run(seed, 20_000) for seed in (1, 1, 2))
    assert (first.bytes, first.cases, first.outcomes) == (again.bytes, again.cases, again.outcomes)
    assert (first.bytes, first.outcomes) != (other.bytes, other.outcomes)


def test_a_fault_is_found_and_its_case_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(raw: bytes) -> None:
        raise KeyError("an error that nobody declared")

    monkeypatch.setattr(fuzz, "decode_properties", stumble)
    with pytest.raises(fuzz.Fault, match=r"case (\d+) of seed 3: KeyError.*--seed 3 --case \1"):
        fuzz.run(seed=3, wanted_bytes=100_000)
