"""The README says what is so: its program runs, and its table has the lines that the demo prints."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from services.demo.figures import Figures, lines
from tests.programs import ROOT, run_program

README = (ROOT / "README.md").read_text()
PROGRAM = re.search(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_program_is_an_example_and_runs(tmp_path: Path) -> None:
    assert PROGRAM is not None
    program = tmp_path / "shop.py"
    program.write_text(PROGRAM[1])

    assert PROGRAM[1] in (ROOT / "examples" / "01_hello.py").read_text()
    assert run_program(program, tmp_path) == "order 7 is confirmed\n"


def test_the_table_has_the_lines_and_targets_of_the_demo() -> None:
    zeros = {field.name: "" if field.name == "mode" else 0 for field in msgspec.structs.fields(Figures)}
    table = README.partition("<!-- figures: make demo -->")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]

    assert [(row[0], row[-1]) for row in rows] == [
        (line.label, line.target) for line in lines(msgspec.convert(zeros, Figures), rate=10_000)
    ]
