"""No public name comes, goes or changes unseen, nor untold."""

from pathlib import Path

import pytest

import orderbus
from tests.release.api import BEFORE, LISTING, first_entry, listing, public_modules, untold

TOLD = "## 2.0.0\n\n- `Bus.open` takes a limit, `Shop` is new, and `close` is gone."


def test_the_listing_is_the_public_api_as_it_is() -> None:
    assert listing() == LISTING.read_text(), "run `make api`, and tell in CHANGELOG.md's first entry what has changed"


def test_the_changelog_tells_of_every_public_name_that_is_new_gone_or_changed() -> None:
    assert first_entry().split()[1] == orderbus.__version__
    assert untold(LISTING, BEFORE, first_entry()) == []


def test_what_stands_for_itself_is_listed_and_what_a_package_exports_is_listed_once() -> None:
    names = [module.__name__ for module in public_modules()]

    assert {"orderbus", "orderbus.errors", "orderbus.logs", "orderbus.telemetry", "orderbus.testing.sim"} <= set(names)
    assert not [name for name in names if "._" in name or name.startswith(("orderbus.adapters", "orderbus.testing.sim."))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("x.Bus.open(limit: int) -> None", []),
        ("x.Bus.open_all(limit: int) -> None", ["x.Bus.open_all"]),
        ("x.Shop(name: str)\nx.Shop.name: str", []),
        ("x.Store(name: str)\nx.Store.name: str", ["x.Store"]),
        ("x.Bus(name: str, more: int)", []),
        ("x.Tx(name: str, more: int)", ["x.Tx"]),
    ],
)
def test_a_line_that_differs_must_be_told_by_its_name(tmp_path: Path, line: str, missing: list[str]) -> None:
    before, now = tmp_path / "before", tmp_path / "now"
    same = "x.Bus.stats: Stats\n"
    before.write_text(f"# 1\nx.Bus(name: str)\nx.Bus.close() -> None\nx.Tx(name: str)\n{same}")
    kept = "" if line.startswith("x.Bus(") else "x.Bus(name: str)\n"
    kept += "" if line.startswith("x.Tx(") else "x.Tx(name: str)\n"
    now.write_text(f"# 2\n{kept}{line}\n{same}")

    assert untold(now, before, TOLD) == missing
    assert "x.Bus.close" in untold(now, before, TOLD.replace("close", "…"))
