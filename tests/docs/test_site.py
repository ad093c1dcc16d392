"""What `make docs` builds: every page has its place, every link a target, and the reference every public name."""

from __future__ import annotations

import importlib.util
import re

import pytest

import orderbus
from tests.programs import ROOT

SPEC = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
assert SPEC is not None
assert SPEC.loader is not None
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)
PAGES: dict[str, str] = build.sources()


def test_every_page_has_a_place_in_the_table_of_contents() -> None:
    placed = {name for patterns in build.NAV.values() for pattern in patterns for name in build.matching(pattern, PAGES.values())}

    assert placed == set(PAGES.values())


@pytest.mark.parametrize("source", PAGES)
def test_a_link_leads_to_a_page_of_the_site_or_to_the_repository(source: str) -> None:
    text = build.relinked((ROOT / source).read_text(), source, PAGES)

    for target, _ in build.LINK.findall(text):
        here = (ROOT / "site" / PAGES[source]).parent
        page = (here / target).resolve().relative_to(ROOT / "site") if target and "://" not in target else None
        assert page is None or str(page) in PAGES.values()


def test_the_reference_has_every_public_name_and_no_other() -> None:
    names = re.findall(r"^::: orderbus\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)

    assert sorted(names) == sorted(orderbus.__all__)
