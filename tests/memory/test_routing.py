"""Topic patterns against the definition they come from, read as plainly as possible."""

from __future__ import annotations

from hypothesis import given, strategies as st

from orderbus.adapters.memory.routing import topic_matches

WORD = st.sampled_from(["a", "b", ""])
PATTERN = st.lists(st.sampled_from(["a", "b", "*", "#", ""]), min_size=1, max_size=6)


def _matches_by_definition(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches_by_definition(pattern[1:], words[at:]) for at in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _matches_by_definition(pattern[1:], words[1:])


@given(PATTERN, st.lists(WORD, min_size=1, max_size=6))
def test_patterns_match_what_their_definition_says(pattern: list[str], words: list[str]) -> None:
    assert topic_matches(pattern, words) == _matches_by_definition(pattern, words)


def test_many_hashes_cost_no_more_than_their_number() -> None:
    assert not topic_matches(["#", "a"] * 200, ["a"] * 199 + ["b"])
