"""docs/errors.md and the code say the same: each code that is raised has its cause and its fix there, and no other code is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from orderbus import TopologyError, UsageError, errors
from tests.programs import ROOT

TEXT = (ROOT / "docs" / "errors.md").read_text()
ENTRIES = dict(re.findall(r"^### (OB\d{3})\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))
CODED = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}


def raised() -> Iterator[tuple[str, str | None]]:
    """Place and code of every UsageError that is made in the package; a code taken over from another error is that one's."""
    for path in sorted((ROOT / "orderbus").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == UsageError.__name__:
                code = next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None)
                if not isinstance(code, ast.Attribute):
                    value = code.value if isinstance(code, ast.Constant) else None
                    yield f"{path.relative_to(ROOT)}:{call.lineno}", str(value) if value else None


RAISED = list(raised())


def test_every_usage_error_has_a_code() -> None:
    assert [place for place, code in RAISED if code is None] == []


def test_every_class_of_errors_has_a_code_of_its_own_or_gets_one_where_it_is_raised() -> None:
    without = {name for name in CODED if getattr(errors, name).code is None}

    assert without == {"OrderbusError", "UsageError"}


def test_the_page_has_every_code_and_no_other_in_order() -> None:
    codes = {code for _, code in RAISED if code} | {getattr(errors, name).code for name in CODED} - {None}

    assert list(ENTRIES) == sorted(codes)
    assert TEXT.count("\n### ") == len(ENTRIES)


@pytest.mark.parametrize("code", ENTRIES)
def test_each_entry_says_the_cause_and_the_fix(code: str) -> None:
    assert re.match(r"\n\S.*?\n\n- Cause: \S.*?\n- Fix:\s+\S", ENTRIES[code], re.DOTALL)


def test_the_text_ends_with_code_and_address_on_a_line_of_its_own_below_a_list() -> None:
    assert str(UsageError("no.", code="OB204")) == f"no. [OB204: {errors.PAGE}#ob204]"
    assert str(TopologyError("no:\n  - this")) == f"no:\n  - this\n[OB501: {errors.PAGE}#ob501]"
    assert str(UsageError("of your own")) == "of your own"
