"""No page of the docs points at something that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)")
PATH = re.compile(r"`((?:orderbus|services|tests|examples|docs|bench|compose)/[A-Za-z0-9_./-]*)(?:::([A-Za-z0-9_]+))?`")


def references(page: Path) -> Iterator[tuple[str, bool]]:
    """Each path that a page names (tests by `file::name` as well), and whether it is there."""
    text = page.read_text()
    for target, _ in LINK.findall(text):
        if "://" not in target and not target.startswith("mailto:"):
            yield target, (page.parent / target).exists()
    for path, test in PATH.findall(text):
        found = (ROOT / path).exists()
        yield f"{path}::{test}", found and (not test or f"def {test}(" in (ROOT / path).read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_and_test_that_a_page_names_exists(page: Path) -> None:
    assert [name for name, is_there in references(page) if not is_there] == []
