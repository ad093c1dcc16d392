"""`make audit`: what is installed here, looked up among the known vulnerabilities. Never says that all is well of what was not looked up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LIMIT_S = 300.0
_UNREACHABLE = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "ServiceError")
_COMMAND = ("--format", "json", "--progress-spinner", "off", "--skip-editable", "--timeout", "10")


def verdict(code: int, stdout: str, stderr: str) -> tuple[int, str]:
    """The exit code and what to say, of an end of pip-audit. 0 too where its database can't be reached, and then the line says so.

    pip-audit itself ends with 0, and "no known vulnerabilities", where the database knew none of the packages by name.
    """
    try:
        found = json.loads(stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(name in stderr for name in _UNREACHABLE):
            return 0, "audit: SKIPPED, nothing was checked: the database of vulnerabilities can't be reached"
        return code or 1, f"audit: pip-audit failed\n{stderr[-2000:]}"
    checked = [package for package in found if "skip_reason" not in package]
    if not checked:
        return (
            0,
            f"audit: SKIPPED, nothing was checked: the database of vulnerabilities answers for none of {len(found)} packages",
        )
    bad = [
        f"  {package['name']} {package['version']}: {weakness['id']}, mended in {', '.join(weakness['fix_versions']) or 'no version'}"
        for package in checked
        for weakness in package["vulns"]
    ]
    unknown = [package["name"] for package in found if "skip_reason" in package]
    left_out = f"; not checked: {', '.join(unknown)}" if unknown else ""
    said = f"audit: {len(bad)} known vulnerabilities in {len(checked)} packages{left_out}"
    return int(bool(bad)), "\n".join([said, *bad])


def main() -> int:
    program = str(Path(sys.executable).with_name("pip-audit"))
    done = subprocess.run([program, *_COMMAND], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    code, said = verdict(done.returncode, done.stdout, done.stderr)
    print(said)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
