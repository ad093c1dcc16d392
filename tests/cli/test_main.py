"""What holds for every verb: help with an example, exit codes, colours, width, and a missing package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import orderbus
from tests.cli.conftest import LIMIT_S, ROOT, Project

VERBS = [
    ("run",), ("describe",), ("check",), ("schema", "sql"), ("schema", "apply"), ("schema", "check"), ("dlq", "list"), ("dlq", "show"),
    ("dlq", "replay"), ("publish",), ("topology", "plan"), ("topology", "apply"),
]  # fmt: skip


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
