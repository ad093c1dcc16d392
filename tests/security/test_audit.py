"""What `make audit` says: a weakness fails it, and what was not looked up is never called sound."""

from __future__ import annotations

import json

from tests.security.audit import verdict

SOUND = {"name": "sound", "version": "1.0", "vulns": []}
WEAK = {"name": "weak", "version": "1.0", "vulns": [{"id": "PYSEC-2026-1", "fix_versions": ["1.1"]}]}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found on PyPI and could not be audited: unknown (1.0)"}


def of(*packages: object) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_weakness_fails_and_is_named_with_its_cure() -> None:
    code, said = verdict(1, of(SOUND, WEAK), "")
    assert code == 1
    assert "weak 1.0: PYSEC-2026-1, mended in 1.1" in said


def test_what_was_looked_up_and_is_sound_passes() -> None:
    assert verdict(0, of(SOUND), "") == (0, "audit: 0 known vulnerabilities in 1 packages")


def test_what_could_not_be_looked_up_is_named() -> None:
    code, said = verdict(0, of(SOUND, UNKNOWN), "")
    assert (code, said.endswith("in 1 packages; not checked: unknown")) == (0, True)


def test_a_database_that_knows_no_package_has_checked_nothing() -> None:
    code, said = verdict(0, of(UNKNOWN, UNKNOWN), "No known vulnerabilities found")
    assert (code, said.startswith("audit: SKIPPED, nothing was checked")) == (0, True)


def test_a_database_out_of_reach_is_one_line() -> None:
    code, said = verdict(1, "", "Traceback …\nrequests.exceptions.ConnectionError: no such host")
    assert (code, said.count("\n"), "SKIPPED" in said) == (0, 0, True)


def test_any_other_failure_fails() -> None:
    assert verdict(2, "", "no such option")[0] == 2
    assert verdict(0, "no JSON", "")[0] == 1
