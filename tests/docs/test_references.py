"""No page of the docs points at something that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)")
LINKED = re.compile(r"\]\(((?!https?:)[^)#\s]*)#([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
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


def anchors(page: Path) -> set[str]:
    """Where a link into a page can lead: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_heading_that_a_page_links_to_exists(page: Path) -> None:
    links = [
        (page.parent / target if target else page, anchor) for target, anchor in LINKED.findall(FENCED.sub("", page.read_text()))
    ]

    assert [f"{to.name}#{anchor}" for to, anchor in links if to.suffix == ".md" and anchor not in anchors(to)] == []
