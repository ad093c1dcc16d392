"""What holds for every verb: help with an example, exit codes, colours, width, and a missing package."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

import orderbus
from orderbus.cli.app import app
from tests.cli.conftest import LIMIT_S, ROOT, Project


def verbs(command: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every verb that there is, as one types it."""
    for name, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from verbs(inner, (*before, name))
        else:
            yield (*before, name)


VERBS = sorted(verbs(get_command(app)))


def test_every_verb_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    table = page.partition("| verb |")[2].partition("\n\n")[0]
    words = set(re.findall(r"[a-z]+", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert {word for verb in VERBS for word in verb} <= words


def test_the_version(project: Project) -> None:
    assert project.run("--version").stdout == f"orderbus {orderbus.__version__}\n"


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_the_help_of_every_verb_has_an_example(project: Project, verb: tuple[str, ...]) -> None:
    result = project.run(*verb, "--help")
    assert result.exit_code == 0
    assert f"orderbus {' '.join(verb)}" in result.stdout.partition("Example:")[2]


def test_the_help_names_the_exit_codes(project: Project) -> None:
    text = " ".join(project.run("--help").stdout.split())
    for code in ("0 fine", "1 findings", "2 wrong use", "3 a stop that was not clean", "4 a server is not available"):
        assert code in text


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_fits_a_narrow_terminal_and_has_no_colours_where_none_are_wanted(project: Project, verb: tuple[str, ...]) -> None:
    project.environment |= {"COLUMNS": "60", "NO_COLOR": "1", "TERM": "xterm"}
    text = project.run(*verb, "--help").stdout
    assert max(map(len, text.splitlines())) <= 60
    assert "\x1b[3" not in text


def test_a_verb_that_does_not_exist(project: Project) -> None:
    result = project.run("runn")
    assert result.exit_code == 2
    assert "run" in result.stderr


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from orderbus.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 2
    assert done.stderr == f"orderbus: the command line needs the package {package}: pip install 'orderbus[cli]'\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_completion_for_the_shell(project: Project, shell: str) -> None:
    asked = {"_ORDERBUS_COMPLETE": f"complete_{shell}", "COMP_WORDS": "orderbus topo", "COMP_CWORD": "1"}
    asked |= {"_TYPER_COMPLETE_ARGS": "orderbus topo", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    project.environment |= asked
    _, output, _ = project.finish()
    assert "topology" in output
    assert "describe" not in output


def test_colours_are_for_terminals_that_want_them(project: Project) -> None:
    project.write('from orderbus import Bus\nbus = Bus("shop")')
    assert "\x1b[" not in project.run("check", project.bus).stdout
    del project.environment["NO_COLOR"]
    project.environment["FORCE_COLOR"] = "1"
    assert "\x1b[32mok" in project.run("check", project.bus).stdout
    project.environment["NO_COLOR"] = "1"
    assert "\x1b[32m" not in project.run("check", project.bus).stdout
