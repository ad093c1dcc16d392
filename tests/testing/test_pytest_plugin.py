"""The pytest plugin does nothing unasked. That it gives virtual time where it is asked is shown by tests/docs/test_testing_page.py."""

from __future__ import annotations

from pathlib import Path

from tests.programs import run_tests

TEST = """
import sys


def test_nothing_was_imported_or_set_up(request):
    assert "orderbus_pytest" in sys.modules
    assert [name for name in sys.modules if name.partition(".")[0] in ("orderbus", "msgspec", "opentelemetry", "trio")] == []
    assert "virtual_time" not in request.fixturenames
"""


def test_a_pytest_that_asks_for_nothing_imports_nothing_of_orderbus(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(TEST)

    assert "1 passed" in run_tests(tmp_path, "--disable-plugin-autoload", "-p", "orderbus")
