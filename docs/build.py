"""Makes the site in build/site out of the repository's Markdown: `make docs`. Fails where a link, an anchor or a page is missing.

The pages are written to be read where they lie, and link to code, tests and each other as files do. zensical knows only one folder of
pages, so they are copied into build/docs, and links to what is no page are pointed at the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/orderbus/orderbus"
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")

MOVED = {"README.md": "index.md", "ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md"}
"""Pages outside of docs/, and their names on the site. A page of docs/ keeps its own."""
NAV = {
    "Start": ["index.md", "tutorial.md"],
    "How to": ["howto/*.md", "adding-a-service.md"],
    "Reference": ["reference.md", "settings.md", "cli.md", "errors.md", "changelog.md"],
    "What holds": ["guarantees.md", "performance.md", "security.md"],
    "On call": ["operations.md", "telemetry.md"],
    "Testing": ["testing*.md", "simulator.md"],
    "Inside": ["architecture.md", "prd*.md", "adr/README.md", "adr/[0-9]*.md"],
}


def main() -> int:
    """Build it. The exit code is zensical's, which is not 0 where a link leads nowhere."""
    pages = sources()
    target = ROOT / "build" / "docs"
    shutil.rmtree(target, ignore_errors=True)
    for source, name in pages.items():
        page = target / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(relinked((ROOT / source).read_text(), source, pages))
    config = ROOT / "build" / "zensical.toml"
    config.write_text((ROOT / "docs" / "zensical.toml").read_text() + navigation(pages.values()))
    zensical = Path(sys.executable).with_name("zensical")
    return subprocess.run([zensical, "build", "--clean", "--strict", "--config-file", config], cwd=ROOT, check=False).returncode


def sources() -> dict[str, str]:
    """Every page of the site: where it lies in the repository, and its name on the site."""
    docs = {str(path.relative_to(ROOT)): str(path.relative_to(ROOT / "docs")) for path in sorted((ROOT / "docs").rglob("*.md"))}
    return MOVED | docs


def relinked(text: str, source: str, pages: dict[str, str]) -> str:
    """A page's text with its links as the site needs them. What leads nowhere is left as it is: zensical finds it."""
    here = PurePosixPath(source).parent

    def replaced(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        path = os.path.normpath(here / target)
        if path in pages:
            return f"]({os.path.relpath(pages[path], PurePosixPath(pages[source]).parent)}{anchor})"
        if (ROOT / path).exists():
            return f"]({REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{anchor})"
        return link[0]

    return LINK.sub(replaced, text)


def navigation(names: Collection[str]) -> str:
    """The table of contents as TOML. Raises ValueError for a page that stands in no section, and so could not be found."""
    sections, left = [], set(names)
    for title, patterns in NAV.items():
        found = [name for pattern in patterns for name in matching(pattern, names)]
        left.difference_update(found)
        sections.append(f'  {{ "{title}" = {found} }},')
    if left:
        raise ValueError(f"docs/build.py: NAV has no place for {', '.join(sorted(left))}")
    return "\nnav = [\n" + "\n".join(sections) + "\n]\n"


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if PurePosixPath(name).match(pattern) and name.count("/") == pattern.count("/"))


if __name__ == "__main__":
    sys.exit(main())
